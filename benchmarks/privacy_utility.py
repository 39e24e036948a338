"""What privacy costs in accuracy: digits at several epsilons, mean and spread over seeds.

python -m benchmarks.privacy_utility [PICTURE]
tfdist run -n 2 -m benchmarks.privacy_utility
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import json
import sys
from typing import Any

import keras
import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import tfdist

L = keras.layers
EPSILONS = (1.0, 3.0, 8.0)
SEEDS = range(5)
BATCH, EPOCHS, DELTA = 256, 30, 1e-4


def model(seed: int) -> Any:
    keras.utils.set_random_seed(seed)
    made = keras.Sequential([keras.Input((64,)), L.Dense(64, activation="tanh"), L.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    made.compile(keras.optimizers.SGD(0.5, momentum=0.9), loss, metrics=["accuracy"])
    return made


def accuracy(seed: int, noise: float | None) -> float:
    """Trains on three quarters of the digits, and gives the accuracy on the rest."""
    x, y = load_digits(return_X_y=True)
    parts = train_test_split(x / 16, y, test_size=0.25, stratify=y, random_state=seed)
    x_train, x_test, y_train, y_test = parts
    privacy = None
    if noise is not None:
        privacy = tfdist.DPSGD(0.5, noise_multiplier=noise, delta=DELTA)
    made = model(seed)
    options = {"batch_size": BATCH, "epochs": EPOCHS, "verbose": 0, "privacy": privacy}
    tfdist.fit(made, x_train, y_train, **options)
    score = tfdist.evaluate(made, x_test, y_test, verbose=0, return_dict=True)
    return float(score["accuracy"])


def noise_for(epsilon: float) -> float:
    rows = 1347
    return tfdist.privacy.noise_multiplier(
        target_epsilon=epsilon,
        sampling_probability=BATCH / rows,
        steps=EPOCHS * -(-rows // BATCH),
        delta=DELTA,
    )


def draw(results: dict[str, list[float]], path: str) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5.5, 3.2), layout="constrained")
    for position, values in enumerate(results.values()):
        axes.scatter([position] * len(values), np.multiply(values, 100), s=18, alpha=0.5)
        axes.plot([position - 0.2, position + 0.2], [100 * np.mean(values)] * 2, "k")
    axes.set_xticks(range(len(results)), list(results))
    axes.set_ylabel("held-out accuracy, %")
    figure.savefig(path)


def main(path: str = "") -> None:
    session = tfdist.init()
    kinds = {f"epsilon {epsilon:g}": noise_for(epsilon) for epsilon in EPSILONS}
    settings: dict[str, float | None] = {**kinds, "no privacy": None}
    results = {name: [accuracy(s, noise) for s in SEEDS] for name, noise in settings.items()}
    if not session.is_chief:
        return
    table = Table(title=f"Digits, delta {DELTA:g}, {session.strategy.name}")
    for column in ("", "noise multiplier", "accuracy, %", "deviation"):
        table.add_column(column, justify="right" if column else "left")
    for name, values in results.items():
        noise = settings[name]
        percent = np.multiply(values, 100)
        shown = "" if noise is None else f"{noise:.2f}"
        table.add_row(name, shown, f"{percent.mean():.1f}", f"{percent.std(ddof=1):.1f}")
    Console(width=90).print(table)
    print(json.dumps({"strategy": session.strategy.name, "accuracy": results}))
    if path:
        draw(results, path)


if __name__ == "__main__":
    main(*sys.argv[1:])
