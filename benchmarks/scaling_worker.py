"""One worker of the scaling benchmark, pinned to a core; the chief prints examples/s.

tfdist run -n 2 benchmarks/scaling_worker.py tfdist|horovod|tf_keras ROWS BATCH
"""

from __future__ import annotations

import os
import sys

LIBRARY, ROWS, BATCH = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if LIBRARY == "tf_keras":
    os.environ["TF_USE_LEGACY_KERAS"] = "1"
if hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    core = cores[int(os.environ.get("TFDIST_LOCAL_RANK", "0"))]
    for thread in os.listdir("/proc/self/task"):  # Horovod's began before this script
        os.sched_setaffinity(int(thread), {core})

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf


def cnn(library: Any) -> Any:
    layers = library.layers
    model = library.Sequential(
        [
            layers.InputLayer((28, 28, 1)),
            layers.Conv2D(32, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(10),
        ]
    )
    loss = library.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer="adam", loss=loss, metrics=["accuracy"])
    return model


def with_tfdist(x: Any, y: Any) -> tuple[Callable[[], Any], bool]:
    import keras

    import tfdist

    tfdist.init(seed=1)
    model = cnn(keras)
    return lambda: tfdist.fit(model, x, y, batch_size=BATCH, verbose=0), tfdist.is_chief()


def with_tf_keras(x: Any, y: Any) -> tuple[Callable[[], Any], bool]:
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    with strategy.scope():
        model = cnn(tf.keras)
    data = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x), seed=1).batch(BATCH)
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = (
        tf.data.experimental.AutoShardPolicy.DATA
    )
    data = data.with_options(options)
    return lambda: model.fit(data, verbose=0), int(
        os.environ.get("TFDIST_LOCAL_RANK", "0")
    ) == 0


def main() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, 28, 28, 1)).astype("float32")
    y = rng.integers(0, 10, size=ROWS)
    epoch, chief = (with_tf_keras if LIBRARY == "tf_keras" else with_tfdist)(x, y)
    epoch()
    rates = []
    for _ in range(4):
        start = time.perf_counter()
        epoch()
        rates.append(ROWS / (time.perf_counter() - start))
    if chief:
        print(f"examples/s {sorted(rates)[len(rates) // 2]:.1f}", flush=True)


if __name__ == "__main__":
    main()
