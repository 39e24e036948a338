"""A worker of `benchmarks.packs`: trains, and prints what a step takes in MiB and ms.

Its argument is the number of layers, their width, and "packs" or "one tensor".
"""

from __future__ import annotations

import statistics
import sys

import keras
import numpy as np

import tfdist
from benchmarks.memory import Steps, mib
from tfdist.strategies import tf_distribute

BATCH, STEPS = 32, 10


def main(layers: str, width: str, kind: str) -> None:
    if kind != "packs":
        tf_distribute.PACK_BYTES = 2**62
    size = int(width)
    dense = [keras.layers.Dense(size, "tanh") for _ in range(int(layers))]
    model = keras.Sequential([keras.Input((size,)), *dense, keras.layers.Dense(1)])
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    x = np.random.default_rng(0).normal(size=(BATCH * STEPS, size)).astype("float32")
    built, steps = mib("VmRSS"), Steps()
    tfdist.fit(model, x, x[:, :1], batch_size=BATCH, verbose=0, seed=1, callbacks=[steps])
    print(f"measured [{mib('VmHWM') - built}, {statistics.median(steps.times[2:]) * 1e3}]")


if __name__ == "__main__":
    main(*sys.argv[1].split(","))
