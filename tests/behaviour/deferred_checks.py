"""What a model that is built in parts must do where replicas are; see `checks.py`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfdist
from tests.behaviour.checkpoint_checks import Stop, StoppedError
from tests.behaviour.checks import ORDERED, place
from tests.behaviour.registry import HOROVOD, MIRRORED, MULTI_WORKER, check
from tests.behaviour.zero_checks import assert_close, state_of, train, wide
from tests.equivalence.cases import table
from tfdist import _keras
from tfdist.errors import StrategyError
from tfdist.sharding import slots

ZERO = tfdist.Zero(3)


def built_in_parts(make: Any = wide) -> Any:
    """Builds a model without its weights. Its seeds differ from those of other processes."""
    random_seed = keras.utils.set_random_seed

    def another(seed: int) -> None:
        random_seed(seed + place().worker_index)

    with mock.patch.object(keras.utils, "set_random_seed", another), tfdist.deferred_weights():
        return make()


@check(MULTI_WORKER, full=(HOROVOD,))
def a_model_built_in_parts_stays_in_parts_and_trains_as_a_whole_one(folder: Path) -> None:
    expected, model = wide(), built_in_parts()
    kernels = [v for v in model.variables if len(v.shape) > 1 and v.shape.num_elements() > 1000]
    assert len(kernels) == 2
    assert all(_keras.deferred(kernel) is not None for kernel in kernels)
    # No process may have a whole weight for good.
    with mock.patch.object(_keras.Deferred, "filled", side_effect=AssertionError):
        ours = train(model, ZERO)
    assert all(_keras.in_parts(kernel) is not None for kernel in kernels)
    assert_close(ours, train(expected, 0))
    # It can be used, trained further and saved.
    options = {"verbose": 0, "strategy": ZERO}
    assert tfdist.evaluate(model, *table(50), **options) == pytest.approx(
        tfdist.evaluate(expected, *table(50), verbose=0), rel=1e-4
    )
    rows = table(50)[0]
    assert_close([tfdist.predict(model, rows, **options)], [expected.predict(rows, verbose=0)])
    again = {"epochs": 3, "initial_epoch": 2}
    assert_close(train(model, ZERO, **again), train(expected, 0, **again))
    path = folder / f"{place().worker_index}.keras"
    model.save(path)
    saved = keras.saving.load_model(path)  # Keras does not load the state of dropout's seeds
    assert_close(saved.get_weights(), expected.get_weights())
    for ours, theirs in zip(
        saved.optimizer.variables, expected.optimizer.variables, strict=True
    ):
        assert_close([ours], [theirs])


@check(MULTI_WORKER, full=(HOROVOD,))
def weights_that_stay_in_parts_are_read_by_all_or_by_none(folder: Path) -> None:
    model = built_in_parts()
    state = train(model, ZERO)
    with mock.patch.object(slots, "_ALL_READ_S", 2.0):
        if place().is_chief:
            with pytest.raises(StrategyError, match="must be read on all processes"):
                model.get_weights()
        else:
            time.sleep(3)
    assert_close(state_of(model), state)
    with pytest.raises(StrategyError, match="must be trained in parts again"):
        train(model, 0)
    # Compiled again, and after an error on all processes, it goes on from there.
    halves = [value / 2 for value in model.get_weights()]
    expected = wide()
    for seed, of_model in zip(
        expected.non_trainable_variables, model.non_trainable_variables, strict=True
    ):
        seed.assign(of_model)  # of dropout
    for one in (model, expected):
        one.set_weights(halves)
        one.compile(keras.optimizers.Adam(0.01), one.loss)
    assert_close(train(model, ZERO), train(expected, 0))
    for one, strategy in ((model, ZERO), (expected, 0)):
        with pytest.raises(StoppedError):
            train(one, strategy, Stop(2))
    assert_close(state_of(model), state_of(expected))


@check(MULTI_WORKER)
def a_model_built_in_parts_resumes_from_a_checkpoint(folder: Path) -> None:
    options = {**ORDERED, "seed": 1, "checkpoint": folder}
    x, y = table(300)
    tfdist.fit(built_in_parts(), x, y, epochs=1, strategy=ZERO, **options)
    resumed = built_in_parts()
    tfdist.fit(resumed, x, y, epochs=2, strategy=ZERO, **options)
    assert_close(state_of(resumed), train(wide(), 0))


def block() -> Any:
    keras.utils.set_random_seed(7)
    inputs = keras.Input((64,))
    hidden = keras.layers.Dense(128, "tanh", name="up")(inputs)
    hidden = keras.layers.Dense(64, name="down")(hidden)
    model = keras.Model(inputs, keras.layers.Dense(3, name="odd")(hidden))
    model.compile(keras.optimizers.Adam(0.01), "mse")
    return model


@check(full=(MULTI_WORKER,))
def a_model_built_in_parts_trains_on_a_mesh(folder: Path) -> None:
    mesh = tfdist.ModelParallel("auto", {"batch": 1, "model": 2})
    expected, model = block(), built_in_parts(block)
    x = table(22, 64)[0]  # the last batch has 6 rows
    for epochs in (1, 2):  # again, from where it stays in parts
        options = {"epochs": epochs, "initial_epoch": epochs - 1, "batch_size": 8}
        for one, strategy in ((model, mesh), (expected, "auto")):
            tfdist.fit(one, x, x[:, :3], seed=1, verbose=0, strategy=strategy, **options)
        assert _keras.in_parts(model.get_layer("down").kernel) is not None
    evaluated = tfdist.evaluate(model, x, x[:, :3], verbose=0, strategy=mesh)
    assert evaluated == pytest.approx(expected.evaluate(x, x[:, :3], verbose=0), rel=1e-4)
    for ours, theirs in zip(model.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)


@check(full=(MIRRORED,))
def a_model_built_in_parts_is_whole_after_fit_in_one_process(folder: Path) -> None:
    model = built_in_parts()
    assert_close(train(model, ZERO), train(wide(), 0))
    assert all(type(v._value).__name__ == "ResourceVariable" for v in model.variables)


@check(MULTI_WORKER)
def whole_weights_are_equal_everywhere_whatever_was_deferred(folder: Path) -> None:
    model = built_in_parts()
    kernel = model.layers[0].kernel
    if place().is_chief:
        tf.convert_to_tensor(kernel)  # the chief alone has read it
    assert_close(train(model, 0), train(wide(), 0))
