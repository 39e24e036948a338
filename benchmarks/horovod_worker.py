"""One rank of the Horovod benchmark: what is measured within one training process.

tfdist run -n 2 --strategy horovod benchmarks/horovod_worker.py overhead|sparse
tfdist run -n 2 --strategy STRATEGY benchmarks/horovod_worker.py step
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import tfdist
from benchmarks.models import cnn, compiled, digits
from benchmarks.report import Ratio, compare

L = keras.layers
STEPS, BATCH = 30, 64
TABLES = (300, 1_000, 3_000, 10_000, 30_000, 100_000)


def many_small() -> Any:
    """120 variables of at most 4 KiB."""
    layers = [L.Dense(32, activation="relu") for _ in range(60)]
    return compiled(keras.Sequential([keras.Input((784,)), *layers, L.Dense(10)]))


def few_large() -> Any:
    """6 variables, 23 MB."""
    layers = [L.Dense(2048, activation="relu") for _ in range(2)]
    return compiled(keras.Sequential([keras.Input((784,)), *layers, L.Dense(10)]))


def data(model: Any) -> tuple[Any, Any]:
    return digits(STEPS * BATCH, model.input_shape[1:], model.inputs[0].dtype)


class Clock(keras.callbacks.Callback):  # type: ignore[misc]
    """Gives the median step of an epoch, which one interruption does not move."""

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.ends.append(time.perf_counter())

    @property
    def step(self) -> float:
        return statistics.median(end - begin for begin, end in pairwise(self.ends))


def fit_step(model: Any, x: Any, y: Any, **options: Any) -> Callable[[], float]:
    """Gives a function that trains an epoch with tfdist and returns the seconds of a step."""
    clock = Clock()
    options |= {"batch_size": BATCH, "verbose": 0, "seed": 1, "callbacks": [clock]}

    def measure() -> float:
        tfdist.fit(model, x, y, **options)
        return clock.step

    measure()
    return measure


def bare_step(model: Any, x: Any, y: Any) -> Callable[[], float]:
    """The same by hand: local gradients, hvd.allreduce of each, the update."""
    import horovod.tensorflow as hvd

    share = BATCH // hvd.size()
    firsts = [step * BATCH + hvd.rank() * share for step in range(STEPS)]
    batches = [(x[first : first + share], y[first : first + share]) for first in firsts]
    model.optimizer.build(model.trainable_variables)

    @tf.function
    def step(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = model.loss(y, model(x, training=True))
        gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
        gradients = [hvd.allreduce(g, op=hvd.Average) for g in gradients]
        model.optimizer.apply(gradients, model.trainable_variables)
        return loss

    clock = Clock()

    def measure() -> float:
        clock.on_epoch_begin(0)
        for number, batch in enumerate(batches):
            step(*batch).numpy()
            clock.on_train_batch_end(number)
        return clock.step

    measure()
    return measure


def overhead(name: str, make: Callable[[], Any], pairs: int) -> Ratio:
    """A step of tfdist.fit over one of the bare loop."""
    x, y = data(make())
    ours, theirs = fit_step(make(), x, y), bare_step(make(), x, y)
    return compare(f"fit over a bare loop, {name}", ours, theirs, pairs, "<= 1.03")


def sparse(words: int, pairs: int) -> Ratio:
    """Gathered rows of an embedding over the dense table; 512 rows a rank and step."""
    x, y = digits(STEPS * BATCH, (16,), "int32")
    x = np.random.default_rng(1).integers(0, words, size=x.shape)

    def training(as_dense: bool) -> Callable[[], float]:
        pooled = L.GlobalAveragePooling1D()
        inputs = keras.Input((16,), dtype="int32")
        model = keras.Model(inputs, L.Dense(10)(pooled(L.Embedding(words, 32)(inputs))))
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("sgd", loss)
        return fit_step(model, x, y, strategy=tfdist.Horovod(sparse_as_dense=as_dense))

    name = f"gathered rows over a dense gradient, table {words:,} x 32"
    return compare(name, training(False), training(True), pairs)


def main(what: str) -> None:
    tfdist.init(seed=1)
    results: list[Any] = []
    if what == "overhead":
        results = [
            asdict(overhead("CNN", cnn, pairs=51)),
            asdict(overhead("many small variables", many_small, pairs=51)),
            asdict(overhead("few large", few_large, pairs=21)),
        ]
    elif what == "sparse":
        results = [asdict(sparse(words, 11)) for words in TABLES]
    else:
        steps = [fit_step(model, *data(model)) for model in (many_small(), few_large())]
        results = [statistics.median(step() for _ in range(7)) for step in steps]
    if tfdist.is_chief():
        print("measured", repr(results), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
