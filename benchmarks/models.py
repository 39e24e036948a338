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


def digits(rows: int, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Generated images with labels."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, *shape)).astype("float32")
    return x, rng.integers(0, 10, size=rows)
