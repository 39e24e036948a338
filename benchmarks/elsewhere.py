"""What is the same in environments of other libraries; it imports neither Keras nor tfdist.

`benchmarks/privacy.py` and the workers it starts there share these models and this order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def mlp(keras: Any) -> Any:
    """784-512-256-10, of Keras 2 or 3."""
    L = keras.layers
    hidden = [L.Dense(512, activation="relu"), L.Dense(256, activation="relu")]
    return keras.Sequential([keras.Input((784,)), *hidden, L.Dense(10)])


def cnn(keras: Any) -> Any:
    """The CNN of the DP-SGD tutorials for MNIST, of Keras 2 or 3."""
    L = keras.layers
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            L.Conv2D(16, 8, strides=2, padding="same", activation="relu"),
            L.MaxPooling2D(2, 1),
            L.Conv2D(32, 4, strides=2, activation="relu"),
            L.MaxPooling2D(2, 1),
            L.Flatten(),
            L.Dense(32, activation="relu"),
            L.Dense(10),
        ]
    )


def encoder(keras: Any) -> Any:
    """A transformer encoder: d=128, 2 layers, sequence 64, vocabulary 8k; of Keras 2 or 3."""
    L = keras.layers
    words = keras.Input((64,), dtype="int32")
    hidden = L.Embedding(8192, 128)(words)
    for _ in range(2):
        attended = L.MultiHeadAttention(4, 32)(*[L.LayerNormalization()(hidden)] * 2)
        hidden = hidden + attended
        wide = L.Dense(512, activation="gelu")(L.LayerNormalization()(hidden))
        hidden = hidden + L.Dense(128)(wide)
    return keras.Model(words, L.Dense(10)(L.GlobalAveragePooling1D()(hidden)))


def print_pairs(private: Callable[[], float], plain: Callable[[], float], pairs: int) -> None:
    """Measures in turn (A B, B A, ...) and prints "measured" and the pairs."""
    found = []
    for pair in range(pairs):
        if pair % 2:
            theirs, ours = plain(), private()
        else:
            ours, theirs = private(), plain()
        found.append((round(ours, 3), round(theirs, 3)))
    print(f"measured {found}", flush=True)
