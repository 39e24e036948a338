"""Weights that get their values when they are first read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import tfdist
from tfdist import _keras

L = keras.layers


def attention() -> Any:
    keras.utils.set_random_seed(7)
    inputs = keras.Input((4, 48))
    hidden = L.LayerNormalization()(inputs + L.MultiHeadAttention(4, 16)(inputs, inputs))
    hidden = L.Dense(40, kernel_initializer="orthogonal")(L.GlobalAveragePooling1D()(hidden))
    model = keras.Model(inputs, L.Dense(30, kernel_initializer="he_normal")(hidden))
    model.compile("adam", "mse")
    return model


def waiting(model: Any) -> list[str]:
    return [v.path for v in model.variables if _keras.deferred(v) is not None]


def later() -> Any:
    with tfdist.deferred_weights():
        return attention()


def assert_equal(ours: Any, theirs: Any) -> None:
    for a, b in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_building_needs_no_values_and_reading_makes_those_of_keras() -> None:
    model = later()
    model.summary(print_fn=str)
    assert len(waiting(model)) == 6
    assert_equal(model, attention())
    assert not waiting(model)


def test_plain_keras_trains_and_saves_as_ever(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(32, 4, 48)).astype("float32")
    y = x[:, 0, :30]
    ours, theirs = later(), attention()
    for model in (ours, theirs):
        model.fit(x, y, epochs=2, shuffle=False, verbose=0)
    assert_equal(ours, theirs)
    later().save(tmp_path / "whole.keras")
    assert_equal(keras.saving.load_model(tmp_path / "whole.keras"), attention())
    loaded = later()
    loaded.load_weights(tmp_path / "whole.keras")
    assert not waiting(loaded)
    assert_equal(loaded, attention())


@pytest.mark.parametrize(
    "initializer",
    [
        lambda shape, dtype: np.random.default_rng(0).normal(size=shape).astype(dtype),
        keras.initializers.RandomNormal(seed=keras.random.SeedGenerator(1)),
    ],
    ids=["a function", "a generator of seeds"],
)
def test_what_may_depend_on_the_order_is_made_at_once(initializer: Any) -> None:
    with tfdist.deferred_weights():
        model = keras.Sequential([keras.Input((64,)), L.Dense(64, None, True, initializer)])
    assert not waiting(model)
