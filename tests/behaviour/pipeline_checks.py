"""What `tfdist.Pipeline` must do on devices of a process and of servers; see `checks.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfdist
from tests.behaviour.checks import ORDERED, assert_weights_close
from tests.behaviour.registry import MIRRORED, SERVERS, check
from tests.equivalence.cases import clipped_sgd, crossentropy, sequences, table
from tfdist import _keras
from tfdist.errors import ArgumentError, StrategyError

L = keras.layers
HOST = "/job:localhost/replica:0/task:0"


def mlp(*layers: Any, optimizer: Any = None) -> Any:
    keras.utils.set_random_seed(7)
    model = keras.Sequential(
        [
            keras.Input((20,)),
            L.Dense(16, "tanh", kernel_regularizer="l2"),
            L.Dropout(0.3),
            *layers,
            L.Dense(24, "tanh"),
            L.Dense(3),
        ]
    )
    model.compile(optimizer or clipped_sgd(), crossentropy(), metrics=["accuracy"])
    return model


def language(optimizer: Any = None) -> Any:
    """A model with rows of an embedding, a mask, and branches between two places for cuts."""
    keras.utils.set_random_seed(7)
    words = keras.Input((12,), dtype="int32")
    hidden = L.Embedding(50, 8, mask_zero=True)(words)
    hidden = L.Add()([hidden, L.Dense(8, "tanh")(L.LayerNormalization()(hidden))])
    hidden = L.Add()([hidden, L.Dense(8, "tanh")(L.LayerNormalization()(hidden))])
    hidden = L.GlobalAveragePooling1D()(hidden)
    model = keras.Model(words, L.Dense(2)(hidden))
    model.compile(optimizer or keras.optimizers.Adam(0.01), crossentropy())
    return model


def assert_equal_to_keras(make: Callable[[], Any], data: Any, strategy: Any) -> Any:
    """Trains a model on devices, and another one as Keras does."""
    ours, theirs = make(), make()
    options = {**ORDERED, "epochs": 2, "validation_data": tuple(a[:40] for a in data)}
    keras.utils.set_random_seed(3)
    found = tfdist.fit(ours, *data, strategy=strategy, **options)
    keras.utils.set_random_seed(3)
    expected = theirs.fit(*data, **options)
    assert_weights_close(ours, theirs)
    for name, values in expected.history.items():
        np.testing.assert_allclose(found.history[name], values, rtol=1e-5)
    return ours


@check(MIRRORED, SERVERS)
def a_pipeline_equals_plain_keras(folder: Path) -> None:
    # The last batch has one row, for two micro-batches.
    assert_equal_to_keras(mlp, table(129), tfdist.Pipeline(2, 2))


@check(full=(MIRRORED, SERVERS))
def a_pipeline_of_rows_masks_and_branches_equals_plain_keras(folder: Path) -> None:
    assert_equal_to_keras(language, sequences(97), tfdist.Pipeline(2, 3, recompute=False))


@check(MIRRORED, SERVERS)
def a_weight_of_a_pipeline_is_on_one_device_only(folder: Path) -> None:
    model = mlp(optimizer=keras.optimizers.Adam(0.01))
    plain = [_keras.backing_variable(v) for v in model.variables]
    strategy = tfdist.Pipeline(2, 4)
    seen: dict[str, int] = {}

    class Live(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            seen.clear()
            for variable in (*model.trainable_variables, *model.optimizer.variables):
                device = _keras.backing_variable(variable).device.removeprefix(HOST)
                seen[device] = seen.get(device, 0) + _keras.num_bytes(variable)
            for variable in plain:  # it is empty
                assert tf.raw_ops.VariableShape(input=variable.handle).numpy().tolist() == [0]

    tfdist.fit(model, *table(64), strategy=strategy, callbacks=[Live()], **ORDERED)
    placement = tfdist.placement(model, strategy)
    first, last = strategy.plan(model).piped
    assert set(seen) == {first.device, last.device}
    for stage in (first, last):  # weights and both moments
        weights = [v for v in stage.variables if v.trainable]
        numbers = 12 if stage is last else 0  # the count of steps and the learning rate
        assert seen[stage.device] == 3 * sum(map(_keras.num_bytes, weights)) + numbers
        others = sum(_keras.num_bytes(v) for v in stage.variables if not v.trainable)
        predicted = placement.bytes_of(int(stage is last)) - others
        assert predicted == seen[stage.device] - numbers
    assert [_keras.backing_variable(v) for v in model.variables] == plain
    assert not any(map(_keras.is_empty, (*model.variables, *model.optimizer.variables)))
    tfdist.evaluate(model, *table(50), verbose=0)
    model.save(folder / "model.keras")


@check(MIRRORED)
def a_pipeline_refuses_what_it_cannot_compute_as_one_process(folder: Path) -> None:
    def refused(match: str, model: Any, strategy: Any = None, **options: Any) -> None:
        error = (ArgumentError, StrategyError)
        with pytest.raises(error, match=match):
            tfdist.fit(
                model, *table(64), strategy=strategy or tfdist.Pipeline(), **ORDERED, **options
            )

    class Own(L.Layer):  # type: ignore[misc]
        def call(self, inputs: Any) -> Any:
            return inputs - tf.reduce_mean(inputs, 0)

    class Subclassed(keras.Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.dense = L.Dense(3)

        def call(self, inputs: Any) -> Any:
            return self.dense(inputs)

    refused("BatchNormalization layer", mlp(L.BatchNormalization()))
    refused("add losses", mlp(L.Dense(8, activity_regularizer="l2")))
    refused("each example by itself", mlp(Own()))
    subclassed = Subclassed()
    subclassed.compile("sgd", crossentropy())
    refused("Sequential or functional", subclassed)
    single = keras.Sequential([keras.Input((20,)), L.Dense(3)])
    single.compile("sgd", crossentropy())
    refused(r"needs 1 place .* with 0", single)
    refused("a device for each stage", mlp(), tfdist.Pipeline(3))
    refused("`compression` must be left out", mlp(), compression="bf16")
    refused("are traced", _eager())
    with pytest.raises(ArgumentError, match="`stages` must be a whole number of at least 2"):
        tfdist.Pipeline(1)


def _eager() -> Any:
    model = mlp()
    model.compile("sgd", crossentropy(), run_eagerly=True)
    return model
