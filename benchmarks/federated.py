"""What several local steps cost and gain: digits over five clients, equal and unequal ones.

python -m benchmarks.federated [--write]
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import tfdist

L = keras.layers
PAGE = Path(__file__).parent.parent / "docs" / "federated.md"
CLIENTS, ROUNDS, STEPS, BATCH = 5, 60, 8, 16
SEEDS = range(3)
RATE = 0.1

METHODS: dict[str, Callable[[Any], Any]] = {
    "FedAvg": lambda ids: tfdist.FedAvg(local_steps=STEPS, clients=ids),
    "FedProx, 0.1": lambda ids: tfdist.FedAvg(local_steps=STEPS, clients=ids, proximal=0.1),
    "FedAvgM, SGD(0.3, 0.9)": lambda ids: tfdist.FedAvg(
        local_steps=STEPS, clients=ids, server_optimizer=keras.optimizers.SGD(0.3, 0.9)
    ),
    "FedAdam, Adam(0.03)": lambda ids: tfdist.FedAvg(
        local_steps=STEPS, clients=ids, server_optimizer=keras.optimizers.Adam(0.03)
    ),
    "DiLoCo": lambda ids: tfdist.DiLoCo(local_steps=STEPS, clients=ids),
}


def model(seed: int) -> Any:
    keras.utils.set_random_seed(seed)
    made = keras.Sequential([keras.Input((64,)), L.Dense(64, "relu"), L.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    made.compile(keras.optimizers.SGD(RATE), loss, metrics=["accuracy"])
    return made


def data(seed: int) -> Any:
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype("float32")
    return train_test_split(x, y, test_size=0.25, stratify=y, random_state=seed)


def clients_of(labels: Any, seed: int, alike: bool) -> Any:
    """Gives each row to a client: at random, or by digit with shares of Dirichlet(0.1)."""
    random = np.random.default_rng(seed)
    if alike:
        return random.permutation(np.arange(len(labels)) % CLIENTS)
    client = np.zeros(len(labels), int)
    for digit in range(10):
        rows = np.flatnonzero(labels == digit)
        shares = random.dirichlet(np.full(CLIENTS, 0.1))
        client[rows] = random.choice(CLIENTS, size=len(rows), p=shares)
    return client


def accuracy_of(seed: int, passes: int = 1, **options: Any) -> float:
    x_train, x_test, y_train, y_test = data(seed)
    x_train, y_train = np.tile(x_train, (passes, 1)), np.tile(y_train, passes)
    made = model(seed)
    tfdist.fit(made, x_train, y_train, seed=seed, verbose=0, **options)
    return 100 * made.evaluate(x_test, y_test, verbose=0)[1]


def synchronous(seed: int, steps: int) -> float:
    """Trains on batches of all clients, one exchange a step."""
    options = {"batch_size": CLIENTS * BATCH, "steps_per_epoch": steps, "epochs": 1}
    return accuracy_of(seed, passes=30, **options)  # a pass has 17 steps


def federated(seed: int, alike: bool, method: Callable[[Any], Any]) -> float:
    labels = data(seed)[2]
    averaging = method(clients_of(labels, seed, alike))
    return accuracy_of(seed, batch_size=BATCH, epochs=ROUNDS, federated=averaging)


def cell(values: list[float]) -> str:
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"


def table() -> str:
    rows = [["training", "exchanges", "clients alike", "Dirichlet(0.1)"], ["---"] * 4]
    for steps in (ROUNDS * STEPS, ROUNDS):
        found = cell([synchronous(seed, steps) for seed in SEEDS])
        rows.append(["all clients in each step", str(steps), found, "the same"])
    for name, method in METHODS.items():
        began = time.monotonic()
        cells = [cell([federated(s, a, method) for s in SEEDS]) for a in (True, False)]
        rows.append([name, str(ROUNDS), *cells])
        print(f"{name}: {cells}, {time.monotonic() - began:.0f} s", flush=True)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    text = table()
    print(text)
    if "--write" in sys.argv:
        page = PAGE.read_text("utf-8")
        first, rest = page.split("<!-- accuracies -->\n")
        _, last = rest.split("<!-- end of accuracies -->")
        marks = "<!-- accuracies -->\n", "<!-- end of accuracies -->"
        PAGE.write_text(f"{first}{marks[0]}{text}\n{marks[1]}{last}", "utf-8")


if __name__ == "__main__":
    main()
