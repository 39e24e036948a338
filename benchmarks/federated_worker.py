"""Trainings of the benchmark of federated training, and a worker with secure sums.

tfdist run -n 3 benchmarks/federated_worker.py WEIGHTS
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import tfdist

L = keras.layers
ROUNDS, STEPS, BATCH = 60, 8, 16
PARTS = 2  # points of the curve in `STEPS` synchronous steps
RATE = 0.1
WEIGHTS = 64 * 64 + 64 + 64 * 10 + 10
PEOPLE, DELTA = 1000, 1e-4
DRAWN = 10  # the most clients of a round

Optimizer = keras.optimizers.Optimizer
METHODS: dict[str, Callable[..., Any]] = {
    "FedAvg": lambda **who: tfdist.FedAvg(local_steps=STEPS, **who),
    "FedProx, 0.1": lambda **who: tfdist.FedAvg(local_steps=STEPS, proximal=0.1, **who),
    "FedAvgM, SGD(0.3, 0.9)": lambda **who: tfdist.FedAvg(
        local_steps=STEPS, server_optimizer=keras.optimizers.SGD(0.3, 0.9), **who
    ),
    "FedAdam, Adam(0.03)": lambda **who: tfdist.FedAvg(
        local_steps=STEPS, server_optimizer=keras.optimizers.Adam(0.03), **who
    ),
    "DiLoCo": lambda **who: tfdist.DiLoCo(local_steps=STEPS, **who),
}


def on_one_thread() -> None:
    """Steps of so few numbers take longer on several."""
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def model(seed: int, layers: list[Any], rate: float) -> Any:
    keras.utils.set_random_seed(seed)
    made = keras.Sequential([keras.Input((64,)), *layers])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    made.compile(keras.optimizers.SGD(rate), loss, metrics=["accuracy"])
    return made


def data(seed: int) -> Any:
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype("float32")
    return train_test_split(x, y, test_size=0.25, stratify=y, random_state=seed)


def clients_of(labels: Any, seed: int, clients: int, alike: bool) -> Any:
    """Gives each row to a client: at random, or by digit with shares of Dirichlet(0.1)."""
    random = np.random.default_rng(seed)
    if alike:
        return random.permutation(np.arange(len(labels)) % clients)
    client = np.zeros(len(labels), int)
    for digit in range(10):
        rows = np.flatnonzero(labels == digit)
        shares = random.dirichlet(np.full(clients, 0.1))
        client[rows] = random.choice(clients, size=len(rows), p=shares)
    return client


def curve_of(made: Any, seed: int, x: Any, y: Any, **options: Any) -> list[float]:
    """Trains; gives the accuracy on held-out rows after each epoch, in percent."""
    _, x_test, _, y_test = data(seed)
    validation: dict[str, Any] = {
        "validation_data": (x_test, y_test),
        "validation_batch_size": len(x_test),
    }
    history = tfdist.fit(made, x, y, seed=seed, verbose=0, **validation, **options)
    return [100 * value for value in history.history["val_accuracy"]]


def perceptron(seed: int) -> Any:
    """64-64-10."""
    return model(seed, [L.Dense(64, "relu"), L.Dense(10)], RATE)


def synchronous(seed: int, clients: int) -> list[float]:
    """Trains on batches of as many rows as the clients of a round, one exchange a step."""
    x, _, y, _ = data(seed)
    batch = min(clients, DRAWN) * BATCH
    passes = -(-ROUNDS * STEPS * batch // (len(x) // batch * batch))
    options: dict[str, Any] = {
        "batch_size": batch,
        "steps_per_epoch": STEPS // PARTS,
        "epochs": ROUNDS * PARTS,
    }
    return curve_of(
        perceptron(seed), seed, np.tile(x, (passes, 1)), np.tile(y, passes), **options
    )


def federated(seed: int, clients: int, alike: bool, method: str) -> list[float]:
    x, _, y, _ = data(seed)
    ids = clients_of(y, seed, clients, alike)
    drawn = None if clients <= DRAWN else DRAWN
    averaging = METHODS[method](clients=ids, clients_per_round=drawn)
    options: dict[str, Any] = {"batch_size": BATCH, "epochs": ROUNDS, "federated": averaging}
    return curve_of(perceptron(seed), seed, x, y, **options)


def private(seed: int, epsilon: float | None) -> list[float]:
    """Trains a linear model on a thousand people with one or two images each."""
    x, _, y, _ = data(seed)
    noise: dict[str, Any] = (
        {"noise_multiplier": 0.0} if epsilon is None else {"target_epsilon": epsilon}
    )
    privacy = tfdist.ClientDP(0.5, delta=DELTA, sampling_probability=0.1, **noise)
    averaging = tfdist.FedAvg(
        local_steps=2,
        clients=np.random.default_rng(seed).permutation(np.arange(len(x)) % PEOPLE),
        weighting="uniform",
        server_optimizer=keras.optimizers.SGD(1.0, momentum=0.9),
        privacy=privacy,
    )
    made = model(seed, [L.Dense(10, kernel_initializer="zeros")], 0.5)
    options: dict[str, Any] = {"batch_size": 2, "epochs": ROUNDS, "federated": averaging}
    return curve_of(made, seed, x, y, **options)


class Clock(keras.callbacks.Callback):  # type: ignore[misc]
    """Notes how long rounds take. The first one traces the step, and is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._began = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if epoch:
            self.seconds.append(time.perf_counter() - self._began)


def rounds_of(weights: int, secure: Any) -> float:
    """Gives the median time of a round with one local step on each worker."""
    width = round(weights**0.5)
    made = keras.Sequential([keras.Input((width,)), L.Dense(width, use_bias=False)])
    made.compile("sgd", "mse")
    x = np.ones((BATCH, width), "float32")
    clock = Clock()
    tfdist.fit(
        made, x, x, batch_size=BATCH, epochs=12, verbose=0, shard="local", callbacks=[clock],
        federated=tfdist.FedAvg(local_steps=1, secure=secure), verify_every=0,
    )  # fmt: skip
    return statistics.median(clock.seconds)


def main(weights: str) -> None:
    tfdist.init()
    kinds = [("none", None), ("64", tfdist.SecureSum()), ("32", tfdist.SecureSum(bits=32))]
    found = [(name, rounds_of(int(weights), kind)) for _ in range(3) for name, kind in kinds]
    if tfdist.is_chief():
        print("measured", found, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
