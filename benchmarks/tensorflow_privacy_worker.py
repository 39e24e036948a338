"""Steps of tensorflow-privacy, for `python -m benchmarks.privacy --tensorflow-privacy PYTHON`.

python benchmarks/tensorflow_privacy_worker.py MODEL vectorized STEPS PAIRS

Needs a TensorFlow with Keras 2, such as 2.15, and nothing of tfdist, so it runs in an
environment of its own. The models are those of `benchmarks/privacy.py`, with Adam; the private
one's is `VectorizedDPKerasAdamOptimizer`, each example a microbatch. Batches of exactly 256
examples are drawn by Keras, since the library samples nothing. It prints "measured" and a list
of pairs: the mean milliseconds of a private step, and of a plain one, taken in turn.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import sys
import time
from typing import Any

import numpy as np
import tensorflow as tf
from elsewhere import cnn, encoder, mlp, print_pairs  # beside this script
from tensorflow_privacy import VectorizedDPKerasAdamOptimizer

keras = tf.keras
BATCH = 256


MODELS = {"MLP": (mlp, (784,)), "CNN": (cnn, (28, 28, 1)), "encoder": (encoder, (64,))}


class Steps(keras.callbacks.Callback):
    """Times the steps of an epoch but for the first."""

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        now = time.perf_counter()
        if batch == 0:
            self.start = now
        self.mean = 1000 * (now - self.start) / max(1, batch)


def training(name: str, private: bool, steps: int) -> Any:
    """Makes a function that makes so many steps and gives the milliseconds of one."""
    make, shape = MODELS[name]
    model = make(keras)
    random = np.random.default_rng(0)
    x = random.integers(0, 1000, (BATCH * (steps + 1), *shape))
    x = x if name == "encoder" else x.astype("float32") / 1000
    y = random.integers(0, 10, len(x))
    optimizer: Any = keras.optimizers.legacy.Adam()
    reduction = "none" if private else "auto"
    if private:
        optimizer = VectorizedDPKerasAdamOptimizer(1.0, 1.1, num_microbatches=BATCH)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)
    model.compile(optimizer, loss, metrics=["accuracy"])

    def measure() -> float:
        timed = Steps()
        model.fit(x, y, batch_size=BATCH, verbose=0, callbacks=[timed])
        return timed.mean

    return measure


def main(name: str, mode: str, steps: str, pairs: str, threads: str = "2") -> None:
    tf.config.threading.set_intra_op_parallelism_threads(int(threads))
    private, plain = (training(name, kind, int(steps)) for kind in (True, False))
    private(), plain()
    print_pairs(private, plain, int(pairs))


if __name__ == "__main__":
    main(*sys.argv[1:])
