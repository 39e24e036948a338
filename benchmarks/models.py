"""The models and the generated data that the benchmarks share."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

L = keras.layers


def mlp() -> Any:
    """784-256-128-10, with Adam."""
    model = keras.Sequential(
        [
            keras.Input((784,)),
            L.Dense(256, activation="relu"),
            L.Dense(128, activation="relu"),
            L.Dense(10),
        ]
    )
    return compiled(model)


def cnn(width: int = 16) -> Any:
    """Two convolutions and a dense layer on 28x28x1, with Adam."""
    model = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            L.Conv2D(width, 3, activation="relu"),
            L.MaxPooling2D(),
            L.Conv2D(2 * width, 3, activation="relu"),
            L.MaxPooling2D(),
            L.Flatten(),
            L.Dense(10),
        ]
    )
    return compiled(model)


def compiled(model: Any) -> Any:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer="adam", loss=loss, metrics=["accuracy"])
    return model


def digits(rows: int, shape: tuple[int, ...], dtype: str = "float32") -> tuple[Any, Any]:
    """Generated images, or whole numbers below 1000, with labels."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, *shape))
    x = (np.abs(x) * 100).clip(0, 999).astype(dtype) if "int" in dtype else x.astype(dtype)
    return x, rng.integers(0, 10, size=rows)
