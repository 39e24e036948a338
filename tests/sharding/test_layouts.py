"""Which weights a map of layouts divides, and which maps are refused."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

import tfdist
from tfdist.errors import ArgumentError
from tfdist.sharding.layouts import named_by

pytestmark = pytest.mark.quick
MESH = {"batch": 1, "model": 2}


def weights() -> list[Any]:
    layers = [keras.layers.Dense(3, name=name) for name in ("first", "second")]
    model = keras.Sequential([keras.Input((4,)), *layers], name="model")
    return list(model.weights)


def test_a_map_names_the_weights_that_it_divides() -> None:
    layouts = {".*first/kernel": (None, "model"), ".*second/kernel": (None, None)}
    found = named_by(tfdist.ModelParallel(layouts, MESH).layout_map, variables := weights())
    assert found == {id(variables[0]): (None, "model")}


@pytest.mark.parametrize(
    ("layouts", "match"),
    [
        ({"first/kernel": (None, "model")}, "must match the path"),
        ({".*kernel": (None, "model"), ".*first.*": (None, "model")}, "match one pattern"),
        ({".*kernel": ("model",)}, "for each dimension"),
    ],
)
def test_a_map_that_does_not_fit_is_refused(layouts: Any, match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        named_by(tfdist.ModelParallel(layouts, MESH).layout_map, weights())


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (({".*": ("pipe",)}, MESH), "axes of the mesh"),
        (({".*": ("model",)},), "`mesh` must be given"),
        (("all",), "`layout_map` must be"),
        (("auto", 2), "`mesh` must map"),
    ],
)
def test_arguments_without_a_meaning_are_refused(arguments: Any, match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        tfdist.ModelParallel(*arguments)


def test_keras_s_own_map_and_a_dict_are_the_same() -> None:
    mesh = keras.distribution.DeviceMesh((1, 2), ("batch", "model"), np.array(["a:0", "a:1"]))
    layouts = keras.distribution.LayoutMap(mesh)
    layouts[".*kernel"] = (None, "model")
    ours = tfdist.ModelParallel({".*kernel": (None, "model")}, MESH)
    assert tfdist.ModelParallel(layouts) == ours
    assert hash(tfdist.ModelParallel(layouts)) == hash(ours)
    assert ours.devices == 2
