"""Trains a case where it is, and gives what must be equal everywhere."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

import tfdist
from tests.equivalence.own_code import CASES
from tests.places.program import SEED
from tfdist import _keras
from tfdist.strategies.whole import as_whole

PARTS = {
    "zero": tfdist.Zero(),
    "zero3": tfdist.Zero(stage=3),
    "mesh_2x2": tfdist.ModelParallel("auto", {"batch": 2, "model": 2}),
    "mesh_1x4": tfdist.ModelParallel("auto", {"batch": 1, "model": 4}),
}


def do(name: str, folder: Path) -> dict[str, Any]:
    name, _, parts = name.partition(" ")
    options = {"strategy": PARTS[parts]} if parts else {}
    models, history = CASES[name](
        functools.partial(tfdist.fit, seed=SEED, verbose=0, **options)
    )
    models = models if isinstance(models, list) else [models]
    optimizers = [getattr(model, "optimizer", None) for model in models]
    states = [[] if one is None else one.variables for one in optimizers]
    return {
        "weights": [[np.asarray(v) for v in model.variables] for model in models],
        "optimizer": [[np.asarray(v) for v in state] for state in states],
        "plain": all(
            type(v._value).__name__ == "ResourceVariable"
            for model, state in zip(models, states, strict=True)
            for v in (*model.variables, *state)
        ),
        "in_shares": all(map(_is_in_shares, models)),
        "history": history.history,
    }


def _is_in_shares(model: Any) -> bool:
    """Tells whether replicas shared the batches, or each computed all of them."""
    prepared = _keras.attached(model).prepared
    return prepared is None or as_whole(prepared.strategy) is None
