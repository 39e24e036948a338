"""The chief of the parameter-server benchmark.

tfdist run -n 2 --ps 2 benchmarks/parameter_server_worker.py tf_keras|rate|bytes
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import tfdist
from benchmarks.report import Ratio, compare, ratio

L = keras.layers
BATCH, STEPS, PAIRS = 64, 120, 7
WIDTHS = (256, 128)


def rows() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(BATCH * STEPS, 784)).astype("float32")
    return x, rng.integers(0, 10, BATCH * STEPS)


def mlp(library: Any, **options: Any) -> Any:
    layers = [library.layers.Dense(width, activation="relu") for width in WIDTHS]
    model = library.Sequential([library.Input((784,)), *layers, library.layers.Dense(10)])
    loss = library.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"], **options)
    return model


def ours(per_execution: int) -> Callable[[], float]:
    """Gives a function that trains with tfdist and returns steps a second.

    Workers hold the data, as they do with tf_keras.
    """
    model, (x, y) = mlp(keras, steps_per_execution=per_execution), rows()
    strategy = tfdist.ParameterServer(data="workers")
    options = {"batch_size": BATCH, "verbose": 0, "strategy": strategy}
    return rate(keras, lambda **more: tfdist.fit(model, x, y, **options, **more))


def theirs(per_execution: int) -> Callable[[], float]:
    """The same with tf_keras's own fit, on the same cluster."""
    import tf_keras

    strategy = tfdist.init().strategy._servers.strategy
    with strategy.scope():
        model = mlp(tf_keras, steps_per_execution=per_execution)
    x, y = rows()

    def dataset(context: Any) -> Any:
        made = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x)).repeat()
        return made.batch(BATCH).prefetch(2)

    data = tf_keras.utils.experimental.DatasetCreator(dataset)
    options = {"steps_per_epoch": STEPS, "verbose": 0}
    return rate(tf_keras, lambda **more: model.fit(data, **options, **more))


def rate(library: Any, train: Callable[..., Any]) -> Callable[[], float]:
    """Measures the epochs after the first of a fit; at an epoch's end all steps are done."""

    def measure() -> float:
        ends: list[float] = []
        note = library.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: ends.append(time.perf_counter())
        )
        train(epochs=4, callbacks=[note])
        return 3 * STEPS / (ends[-1] - ends[0])

    measure()
    return measure


def against_tf_keras() -> list[Ratio]:
    return [
        compare(f"steps_per_execution={n}", ours(n), theirs(n), PAIRS, ">= 1.5", "steps/s")
        for n in (1, 10)
    ]


class Whole(L.Layer):  # type: ignore[misc]
    """An embedding that reads its whole table, as Keras's own does."""

    def build(self, shape: Any) -> None:
        self.table = self.add_weight(shape=(WORDS, 32), name="table")

    def call(self, ids: Any) -> Any:
        return keras.ops.take(self.table, ids, axis=0)


WORDS = 100_000


def moved(layer: Any) -> float:
    """Counts the bytes that pass the loopback interface in a step."""
    ids = keras.Input((16,), dtype="int32")
    model = keras.Model(ids, L.Dense(1)(L.GlobalAveragePooling1D()(layer(ids))))
    model.compile("adagrad", "mse")
    rng = np.random.default_rng(0)
    x = rng.integers(0, WORDS, (20 * BATCH, 16)).astype("int32")
    y = np.ones((len(x), 1), "float32")

    class Count(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self.start = loopback()

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.bytes = (loopback() - self.start) / 20

    count = Count()
    tfdist.fit(model, x, y, batch_size=BATCH, epochs=2, verbose=0, callbacks=[count])
    return count.bytes


def loopback() -> int:
    text = Path("/proc/net/dev").read_text()
    line = next(line for line in text.splitlines() if line.strip().startswith("lo:"))
    return int(line.split()[1])


def main(what: str) -> None:
    tfdist.init(seed=1)
    results: list[Any] = []
    if what == "tf_keras":
        results = [asdict(r) for r in against_tf_keras()]
    elif what == "rate":
        measure = ours(1)
        results = [statistics.median(measure() for _ in range(3))]
    else:
        by_rows, whole = moved(L.Embedding(WORDS, 32)), moved(Whole())
        name = f"rows over the whole table of {WORDS:,} x 32, batch {BATCH} x 16"
        detail = f"{by_rows:,.0f} / {whole:,.0f} bytes"
        results = [asdict(ratio(name, [by_rows / whole], detail=detail))]
    print("measured", repr(results), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
