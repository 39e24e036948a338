"""Federated training in one process, against a plain loop over clients."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

import tfdist
from tests.federated.reference import federated_averaging, model_of, rows_of

SIZES = (40, 7, 70, 33)
PARTS = rows_of(*SIZES)
X, Y = (np.concatenate(arrays) for arrays in zip(*PARTS, strict=True))
IDS = np.repeat(range(len(SIZES)), SIZES)
OPTIONS: dict[str, Any] = {"batch_size": 16, "shuffle": False, "seed": 5, "verbose": 0}


@pytest.fixture(autouse=True)
def in_float64():
    before = keras.config.floatx()
    keras.config.set_floatx("float64")
    yield
    keras.config.set_floatx(before)


def momentum() -> Any:
    return keras.optimizers.SGD(0.1, momentum=0.9)


def adam() -> Any:
    return keras.optimizers.Adam(0.05)


def decaying() -> Any:
    schedule = keras.optimizers.schedules.ExponentialDecay(0.2, 2, 0.5)
    return keras.optimizers.SGD(schedule, momentum=0.9)


def largest_difference(ours: Any, theirs: Any) -> float:
    pairs = zip(ours.get_weights(), theirs.get_weights(), strict=True)
    return max(float(np.abs(a - b).max()) for a, b in pairs)


CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "whole passes, and statistics of layers": (momentum, {}, {"norm": True}),
    "uniform weights": (adam, {"local_steps": 3, "weighting": "uniform"}, {"uniform": True}),
    "kept optimizers, pulled to the server, Adam on it": (
        adam,
        {
            "local_steps": 3,
            "proximal": 0.3,
            "keep_optimizer": True,
            "server_optimizer": keras.optimizers.Adam(0.1),
        },
        {"proximal": 0.3, "keeps": True, "server": keras.optimizers.Adam(0.1)},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_weights_are_those_of_a_loop_over_clients(name):
    optimizer, settings, reference = CASES[name]
    reference = dict(reference)
    norm = reference.pop("norm", False)
    ours, theirs = (model_of(optimizer(), norm=norm) for _ in range(2))
    averaging = tfdist.FedAvg(clients=IDS, **settings)
    history = tfdist.fit(ours, X, Y, epochs=3, federated=averaging, **OPTIONS)
    losses = federated_averaging(
        theirs, PARTS, 3, optimizer=optimizer, batch_size=16,
        local_steps=settings.get("local_steps"), **reference,
    )  # fmt: skip
    assert largest_difference(ours, theirs) < 1e-13
    np.testing.assert_allclose(history.history["loss"], losses, rtol=1e-12)
