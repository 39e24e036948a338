"""Where a model is cut into stages."""

from __future__ import annotations

import itertools
from typing import Any

import keras
import numpy as np
import pytest

from tfdist import _keras
from tfdist.errors import ArgumentError
from tfdist.sharding.pipeline.plan import _best, plan

L = keras.layers
pytestmark = pytest.mark.quick


def test_the_largest_stage_is_as_small_as_it_can_be():
    rng = np.random.default_rng(0)
    for stages in (2, 3, 4):
        costs = rng.integers(1, 20, (2, 9)).tolist()
        cuts = [1, 2, 4, 5, 7, 8]
        shares = np.array([np.divide(c, sum(c)) for c in costs]).sum(0)

        def largest(chosen: Any, shares: Any = shares) -> float:
            return max(map(sum, np.split(shares, chosen)))

        best = min(map(largest, itertools.combinations(cuts, stages - 1)))
        assert largest(_best(cuts, tuple(costs), stages)) == pytest.approx(best)


def test_branches_and_shared_layers_are_not_cut():
    inputs = keras.Input((8, 8, 3))
    shared = L.Conv2D(4, 3, padding="same", name="shared")
    x = L.Conv2D(4, 3, padding="same", name="first")(inputs)
    x = shared(L.ReLU(name="relu")(shared(x)))
    x = L.Add(name="add")([x, L.Conv2D(4, 1, name="branch")(x)])
    model = keras.Model(inputs, L.Dense(5, name="last")(L.Flatten(name="flat")(x)))
    calls = _keras.layer_calls(_keras.functional_of(model))
    flops = {call.name: call.flops for call in calls}
    # Products, and little for the rest.
    assert flops["first"] == pytest.approx(2 * 64 * 4 * 27, rel=0.1)
    assert flops["last"] == pytest.approx(2 * 256 * 5, rel=0.1)
    found = plan(
        model, [f"/job:localhost/replica:0/task:0/device:CPU:{i}" for i in range(4)], 8
    )
    assert [stage.layers for stage in found.stages] == [
        ("first",), ("shared", "relu"), ("branch", "add"), ("flat", "last")
    ]  # fmt: skip
    assert found.bubble == 3 / 11
    assert "a device waits 3/11 = 27% of a step" in str(found)
    with pytest.raises(ArgumentError, match=r"needs 5 places .* with 4"):
        plan(model, ["a"] * 6, 8)
