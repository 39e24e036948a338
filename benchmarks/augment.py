"""Augmentation in the input road: images/s of `Augment` over the layers in a `Dataset.map`.

python -m benchmarks.augment
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from benchmarks.input_road import drain
from benchmarks.report import Ratio, compare, seconds, show
from tfdist import Augment, data
from tfdist.samplers import Uniform
from tfdist.strategies.base import Place

L = keras.layers
BATCH = 64


def road(
    name: str, shape: tuple[int, ...], make: Callable[[], list[Any]], batched: bool, steps: int
) -> Ratio:
    """Shuffled batches, augmented, nothing computed with them."""
    x = np.random.default_rng(0).random((2048, *shape), dtype=np.float32)
    y = np.zeros(2048, "int32")
    settings = data.Settings(BATCH, None, Uniform(), True, 1, True, augment=Augment(make()))
    source = data.read(x, y, None, settings)
    layers = make()

    def apply(images: Any, labels: Any) -> tuple[Any, Any]:
        for layer in layers:
            images = layer(images, training=True)
        return images, labels

    def plain() -> Any:
        rows = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(2048).repeat()
        if batched:
            return rows.batch(BATCH).map(apply, tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)
        return rows.map(apply, tf.data.AUTOTUNE).batch(BATCH).prefetch(tf.data.AUTOTUNE)

    def rate(iterator: Any) -> float:
        drain(iterator, 20)
        return steps * BATCH / seconds(lambda: drain(iterator, steps))

    def ours() -> float:
        return rate(iter(source.shares(Place(), 0)))

    def theirs() -> float:
        return rate(iter(plain()))

    ours(), theirs()
    kind = "on batches" if batched else "on examples"
    # A layer that crops all examples of a batch alike does less.
    goal = "" if batched and name.startswith("crop") else ">= 1.0"
    return compare(
        f"{name} of {shape[0]}x{shape[1]}, {kind}", ours, theirs, 7, goal, "images/s"
    )


def main() -> None:
    results = []
    for name, shape, make, steps in (
        ("flip", (32, 32, 3), lambda: [L.RandomFlip()], 600),
        ("flip, rotation", (28, 28, 1), lambda: [L.RandomFlip(), L.RandomRotation(0.1)], 400),
        ("flip, rotation", (96, 96, 3), lambda: [L.RandomFlip(), L.RandomRotation(0.1)], 40),
        ("crop to 28", (32, 32, 3), lambda: [L.RandomCrop(28, 28)], 400),
    ):
        results += [road(name, shape, make, batched, steps) for batched in (True, False)]
    show("Images/s of fit's augmentation over the layers in Dataset.map", results)


if __name__ == "__main__":
    main()
