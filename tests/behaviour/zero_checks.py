"""What `tfdist.Zero` must do where replicas are; see `checks.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfdist
from tests.behaviour.checkpoint_checks import Stop, StoppedError
from tests.behaviour.checks import ORDERED, everywhere, level, place
from tests.behaviour.registry import HOROVOD, MIRRORED, MULTI_WORKER, check
from tests.equivalence.cases import crossentropy, mlp, sequences, table
from tfdist import _keras
from tfdist.errors import ArgumentError, StrategyError
from tfdist.sharding import slots
from tfdist.step.state import variables_of

L = keras.layers


def state_of(model: Any) -> list[Any]:
    return [np.asarray(v) for v in (*model.variables, *model.optimizer.variables)]


def assert_same_bits(ours: list[Any], theirs: list[Any]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


def adam() -> Any:
    keras.utils.set_random_seed(7)
    return mlp(keras.optimizers.Adam(0.01))


class Shapes(keras.callbacks.Callback):  # type: ignore[misc]
    """Counts the elements of the optimizer's state while it trains, and saves a copy."""

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.elements = sum(int(np.prod(v.shape)) for v in self.model.optimizer.variables)


def train(model: Any, zero: bool, *callbacks: Any, **options: Any) -> list[Any]:
    strategy = tfdist.Zero() if zero else "auto"
    options = {**ORDERED, "epochs": 2, "seed": 1} | options
    x, y = options.pop("data", table(300))
    tfdist.fit(model, x, y, strategy=strategy, callbacks=list(callbacks), **options)
    return state_of(model)


@check(HOROVOD, full=(MIRRORED, MULTI_WORKER))
def zero_has_the_bits_of_plain_training_and_half_of_the_state(folder: Path) -> None:
    plain, whole, parts = Shapes(), Shapes(), Shapes()
    expected = train(adam(), False, whole)
    model = adam()
    assert_same_bits(train(model, True, parts), expected)
    assert parts.elements <= 0.55 * whole.elements + 16
    first, *others = everywhere(state_of(model))
    for other in others:
        assert_same_bits(other, first)
    # A second fit goes on, with and without; evaluate and save see a whole optimizer.
    tfdist.evaluate(model, *table(50), verbose=0)
    again = adam()
    train(again, False, epochs=2)
    expected = train(again, False, plain, epochs=3, initial_epoch=2)
    assert_same_bits(train(model, True, epochs=3, initial_epoch=2), expected)
    path = folder / f"{place().worker_index}.keras"
    model.save(path)
    assert_same_bits(state_of(keras.saving.load_model(path)), expected)


@check(MULTI_WORKER, full=(MIRRORED, HOROVOD))
def zero_has_the_bits_of_plain_training_with_sparse_gradients(folder: Path) -> None:
    def make() -> Any:
        keras.utils.set_random_seed(7)
        words = keras.Input((12,), dtype="int32")
        hidden = L.GlobalAveragePooling1D()(L.Embedding(50, 8)(words))
        model = keras.Model(words, L.Dense(2)(hidden))
        model.compile(keras.optimizers.Adam(0.01), crossentropy())
        return model

    data = sequences(97)  # words repeat in each batch
    assert_same_bits(train(make(), True, data=data), train(make(), False, data=data))


@check(HOROVOD, full=(MIRRORED, MULTI_WORKER))
def zero_saves_whole_state_at_the_end_of_an_epoch(folder: Path) -> None:
    path = str(folder / "epoch-{epoch}.keras")
    expected = train(adam(), True, keras.callbacks.ModelCheckpoint(path))
    everywhere(None)
    saved = keras.saving.load_model(path.format(epoch=2))
    assert_same_bits(state_of(saved), expected)


@check(MIRRORED, full=(MULTI_WORKER,))
def zero_resumes_with_and_without_parts(folder: Path) -> None:
    expected = train(adam(), False)
    for number, (before, after) in enumerate([(True, False), (False, True)]):
        checkpoint = folder / f"{number}"
        train(adam(), before, epochs=1, checkpoint=checkpoint)
        assert_same_bits(train(adam(), after, checkpoint=checkpoint), expected)


@check(MULTI_WORKER, full=(HOROVOD,))
def zero_saves_slices_of_which_no_process_has_all(folder: Path) -> None:
    model = adam()
    expected = train(model, False)

    def again(directory: Path, *callbacks: Any, **options: Any) -> None:
        level(model, adam())  # the model is traced already
        checkpoint = tfdist.Checkpoint(directory, **options)
        train(model, True, *callbacks, checkpoint=checkpoint)

    shared, own = folder / "shared", folder / f"{place().worker_index}"
    for directory in (shared, own):
        with pytest.raises(StoppedError):
            again(directory, Stop(5), every=3)
    everywhere(None)
    assert shared.exists()
    assert own.exists() == place().is_chief
    for directory in (shared, own) if place().is_chief else (shared,):
        (saved,) = directory.glob("epoch-*")
        assert len(list(saved.glob("tensors.data-*"))) == 2
        shapes = dict(tf.train.list_variables(str(saved / "tensors")))
        for number, variable in enumerate(variables_of(model)):
            assert shapes[f"variables/{number}"] == list(variable.shape)
    for directory in (shared, own):
        again(directory)
        assert_same_bits(state_of(model), expected)
    # A slice that is missing is damage: training goes on from the checkpoint before it.
    everywhere(None)
    if place().is_chief:
        max(shared.glob("epoch-*/tensors.data-00001-*")).unlink()
    again(shared)
    assert_same_bits(state_of(model), expected)
    assert list(shared.glob("damaged-epoch-00002-*"))


@check(MULTI_WORKER, full=(HOROVOD,))
def zero_keeps_state_if_all_processes_end_by_an_error(folder: Path) -> None:
    model = adam()
    with pytest.raises(StoppedError):
        train(model, True, Stop(2))
    assert not any(_keras.is_empty(v) for v in model.optimizer.variables)
    other = adam()
    with pytest.raises(StoppedError):
        train(other, False, Stop(2))
    assert_same_bits(state_of(model), state_of(other))
    with mock.patch.object(slots, "all_ended", return_value=False), pytest.raises(StoppedError):
        train(model, True, Stop(2))
    with pytest.raises(StrategyError, match="has lost"):
        train(model, True)


@check(MIRRORED)
def zero_refuses_updates_and_loading_outside_of_the_steps(folder: Path) -> None:
    class Updates(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            L.Dense(1)  # saving makes a layer too, which may be the first one during `fit`
            self.model.train_on_batch(*table(20))

    model = adam()
    with pytest.raises(StrategyError, match="train_on_batch"):
        train(model, True, Updates())
    model.train_on_batch(*table(20))
    model.save(folder / "whole.keras")

    class Loads(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.model.load_weights(folder / "whole.keras")

    # Keras puts the reasons why a file was not loaded into an error of its own.
    with pytest.raises(ValueError, match="loaded only while its state is whole"):
        train(model, True, Loads())
    model.load_weights(folder / "whole.keras")


@check(MIRRORED)
def zero_refuses_what_it_cannot_keep_exact(folder: Path) -> None:
    def refused(match: str, model: Any = None, *callbacks: Any, **options: Any) -> None:
        with pytest.raises(ArgumentError, match=match):
            train(model or adam(), True, *callbacks, **options)

    class Own(keras.optimizers.Adam):  # type: ignore[misc]
        pass

    refused("Keras's own optimizers", mlp(Own(0.01)))
    refused("sends gradients as they are", compression="bf16")
    refused("are traced", mlp(keras.optimizers.Adam(0.01), run_eagerly=True))
    refused("between steps", None, keras.callbacks.BackupAndRestore(folder / "backup"))
    often = keras.callbacks.ModelCheckpoint(folder / "step.keras", save_freq=2)
    refused("between steps", None, often)
    whole = keras.optimizers.Adam(0.01)  # a refused training leaves an optimizer whole
    refused("traced", mlp(whole, run_eagerly=True))
    assert not any(_keras.is_empty(v) for v in whole.variables)
