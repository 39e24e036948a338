"""The input road alone: rows/s of the sampler's stream over Keras's array road.

python -m benchmarks.input_road
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import resource
from typing import Any

import numpy as np
import tensorflow as tf
from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter

from benchmarks.report import Ratio, compare, seconds, show
from tfdist import data
from tfdist.samplers import Uniform
from tfdist.strategies.base import Place


def drain(iterator: Any, steps: int) -> None:
    """Draws as a traced train function does, in a graph."""
    _draw(iterator, tf.constant(steps))


@tf.function
def _draw(iterator: Any, steps: Any) -> None:
    for _ in tf.range(steps):
        iterator.get_next()


def road(rows: int, columns: int, batch_size: int, pairs: int) -> Ratio:
    """An epoch of shuffled batches, nothing computed with them."""
    x = np.ones((rows, columns), "float32")
    y = np.ones((rows,), "int32")
    # Whole epochs, so that the shuffling of each is counted.
    steps = max(1, 2_000_000 // rows) * (rows // batch_size)
    settings = data.Settings(batch_size, None, Uniform(), True, seed=1, training=True)
    source = data.read(x, y, None, settings)

    def rate(iterator: Any) -> float:
        drain(iterator, 50)  # what starting the pipeline costs, the other benchmark counts
        return steps * batch_size / seconds(lambda: drain(iterator, steps))

    def ours() -> float:
        return rate(iter(source.shares(Place(), 0)))

    def theirs() -> float:
        adapter = ArrayDataAdapter(x, y, batch_size=batch_size, shuffle=True)
        return rate(iter(adapter.get_tf_dataset().repeat()))

    ours(), theirs()
    name = f"{rows:,} rows x {columns}, batch {batch_size}"
    return compare(name, ours, theirs, pairs, ">= 1.0", "rows/s")


def peak_memory() -> float:
    """Gives this process's peak resident memory in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory() -> str:
    """Says what 10 million rows take, beyond the arrays, over an epoch of shuffled batches."""
    x = np.ones((10_000_000, 1), "float32")
    before = peak_memory()
    settings = data.Settings(256, None, Uniform(), True, seed=1, training=True)
    source = data.read(x, x, None, settings)
    iterator = iter(source.shares(Place(), 0))
    drain(iterator, 100)
    started = peak_memory()
    drain(iterator, 10_000_000 // 256)
    return (
        f"10 million rows of 4 + 4 bytes: {started - before:.0f} MiB for the tensors and the "
        f"pipeline, {peak_memory() - started:.0f} MiB more over an epoch of shuffled batches."
    )


def main() -> None:
    said = memory()  # first: the peak of a process never falls
    results = [
        road(60_000, 784, 64, 15),
        road(60_000, 784, 512, 15),
        road(1_000_000, 16, 256, 15),
        road(10_000_000, 1, 256, 9),
    ]
    show("Rows/s of tfdist's stream over Keras's array road", results)
    print(said)


if __name__ == "__main__":
    main()
