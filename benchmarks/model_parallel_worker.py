"""A worker of `benchmarks.model_parallel`: trains, and prints memory in MiB and a step in ms.

Its argument is the number of layers, their width, and the stage of `Zero`, 0 for none. With
"gathered" instead of 3, whole weights are kept from the forward to the backward pass.
"""

from __future__ import annotations

import statistics
import sys
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import tfdist
from benchmarks.memory import Steps, mib, reset_peak
from benchmarks.packs_worker import BATCH, STEPS
from tfdist import _keras


class Measured(Steps):
    """Times steps, and reads the peak of the training before it resets it."""

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if batch == 2:
            self.first_peak = mib("VmHWM")
        super().on_train_batch_begin(batch, logs)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.peak = mib("VmHWM")
        state = [*self.model.weights, *self.model.optimizer.variables]
        with _keras.showing_parts(state):
            self.state = sum(map(_keras.num_bytes, state)) / 2**20


def main(layers: str, width: str, kind: str) -> None:
    size = int(width)
    tf.ones([2, 2]) @ tf.ones([2, 2])
    x = np.random.default_rng(0).normal(size=(BATCH * STEPS, size)).astype("float32")
    before, steps = mib("VmRSS"), Measured()
    reset_peak()
    dense = [keras.layers.Dense(size, "tanh") for _ in range(int(layers))]
    model = keras.Sequential([keras.Input((size,)), *dense, keras.layers.Dense(1)])
    model.compile("adam", "mse")
    stages = {
        "0": "auto",
        "1": tfdist.Zero(1),
        "3": tfdist.Zero(3),
        "gathered": tfdist.Zero(3, gather_again=False),
    }
    tfdist.fit(
        model, x, x[:, :1], batch_size=BATCH, verbose=0, seed=1, callbacks=[steps],
        strategy=stages[kind],
    )  # fmt: skip
    peak = max(steps.first_peak, steps.peak) - before
    step = statistics.median(steps.times[2:]) * 1e3
    print(f"measured [{steps.state}, {peak}, {steps.peak - before}, {step}]")


if __name__ == "__main__":
    main(*sys.argv[1].split(","))
