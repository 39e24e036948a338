"""What `tfdist.Zero` must do where replicas are; see `checks.py`."""

from __future__ import annotations

import gc
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
from tests.equivalence.cases import clipped_sgd, crossentropy, mlp, sequences, table
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


def assert_close(ours: list[Any], theirs: list[Any]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def adam() -> Any:
    keras.utils.set_random_seed(7)
    return mlp(keras.optimizers.Adam(0.01))


class Shapes(keras.callbacks.Callback):  # type: ignore[misc]
    """Counts the elements of the optimizer's state while it trains, and saves a copy."""

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.elements = sum(int(np.prod(v.shape)) for v in self.model.optimizer.variables)


GATHERED = tfdist.Zero(3, gather_again=False)


def train(model: Any, stage: Any, *callbacks: Any, **options: Any) -> list[Any]:
    strategy = {0: "auto", 1: tfdist.Zero(), 3: tfdist.Zero(3)}.get(stage, stage)
    options = {**ORDERED, "epochs": 2, "seed": 1} | options
    x, y = options.pop("data", table(300))
    tfdist.fit(model, x, y, strategy=strategy, callbacks=list(callbacks), **options)
    return state_of(model)


@check(HOROVOD, full=(MIRRORED, MULTI_WORKER))
def zero_has_the_bits_of_plain_training_and_half_of_the_state(folder: Path) -> None:
    plain, whole, parts = Shapes(), Shapes(), Shapes()
    expected = train(adam(), 0, whole)
    model = adam()
    assert_same_bits(train(model, 1, parts), expected)
    assert parts.elements <= 0.55 * whole.elements + 16
    first, *others = everywhere(state_of(model))
    for other in others:
        assert_same_bits(other, first)
    # A second fit goes on, with and without; evaluate and save see a whole optimizer.
    tfdist.evaluate(model, *table(50), verbose=0)
    again = adam()
    train(again, 0, epochs=2)
    expected = train(again, 0, plain, epochs=3, initial_epoch=2)
    assert_same_bits(train(model, 1, epochs=3, initial_epoch=2), expected)
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
    assert_same_bits(train(make(), 1, data=data), train(make(), 0, data=data))


@check(HOROVOD, full=(MIRRORED, MULTI_WORKER))
def zero_saves_whole_state_at_the_end_of_an_epoch(folder: Path) -> None:
    path = str(folder / "epoch-{epoch}.keras")
    expected = train(adam(), 1, keras.callbacks.ModelCheckpoint(path))
    everywhere(None)
    saved = keras.saving.load_model(path.format(epoch=2))
    assert_same_bits(state_of(saved), expected)


@check(MIRRORED, full=(MULTI_WORKER,))
def zero_resumes_with_and_without_parts(folder: Path) -> None:
    expected = train(adam(), 0)
    for number, (before, after) in enumerate([(0, 3), (3, 1)]):
        checkpoint = folder / f"{number}"
        train(adam(), before, epochs=1, checkpoint=checkpoint)
        state = train(adam(), after, checkpoint=checkpoint)
        if 3 in (before, after):
            assert_close(state, expected)
        else:
            assert_same_bits(state, expected)


@check(MULTI_WORKER, full=(HOROVOD,))
def zero_saves_slices_of_which_no_process_has_all(folder: Path) -> None:
    model = adam()
    expected = train(model, 0)

    def again(directory: Path, *callbacks: Any, **options: Any) -> None:
        level(model, adam())  # the model is traced already
        checkpoint = tfdist.Checkpoint(directory, **options)
        train(model, 1, *callbacks, checkpoint=checkpoint)

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
        train(model, 1, Stop(2))
    assert not any(_keras.is_empty(v) for v in model.optimizer.variables)
    other = adam()
    with pytest.raises(StoppedError):
        train(other, 0, Stop(2))
    assert_same_bits(state_of(model), state_of(other))
    with mock.patch.object(slots, "all_ended", return_value=False), pytest.raises(StoppedError):
        train(model, 1, Stop(2))
    with pytest.raises(StrategyError, match="has lost"):
        train(model, 1)


@check(MIRRORED)
def zero_refuses_updates_and_loading_outside_of_the_steps(folder: Path) -> None:
    class Updates(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            L.Dense(1)  # saving makes a layer too, which may be the first one during `fit`
            self.model.train_on_batch(*table(20))

    model = adam()
    with pytest.raises(StrategyError, match="train_on_batch"):
        train(model, 1, Updates())
    model.train_on_batch(*table(20))
    model.save(folder / "whole.keras")

    class Loads(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.model.load_weights(folder / "whole.keras")

    # Keras puts the reasons why a file was not loaded into an error of its own.
    with pytest.raises(ValueError, match="loaded only while its state is whole"):
        train(model, 1, Loads())
    model.load_weights(folder / "whole.keras")


@check(MIRRORED)
def zero_refuses_what_it_cannot_keep_exact(folder: Path) -> None:
    def refused(match: str, model: Any = None, *callbacks: Any, **options: Any) -> None:
        with pytest.raises(ArgumentError, match=match):
            train(model or adam(), 1, *callbacks, **options)

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


# --- weights in parts -----------------------------------------------------------------------


class Live(keras.callbacks.Callback):  # type: ignore[misc]
    """Counts the bytes of the `tf.Variable`s that are made after it, between two steps."""

    def __init__(self) -> None:
        super().__init__()
        self.before = self.count()

    def count(self) -> int:
        gc.collect()
        alive = [v for v in gc.get_objects() if type(v).__name__ == "ResourceVariable"]
        sizes = [tf.raw_ops.VariableShape(input=v.handle).numpy().prod() for v in alive]
        return int(sum(n * v.dtype.size for n, v in zip(sizes, alive, strict=True)))

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if batch == 1:
            self.bytes = self.count() - self.before


def wide() -> Any:
    keras.utils.set_random_seed(7)
    model = keras.Sequential([keras.Input((20,)), L.Dense(128, "gelu"), L.Dropout(0.2)])
    model.add(L.Dense(96, "tanh"))
    model.add(L.Dense(3))
    model.compile(keras.optimizers.Adam(0.01), crossentropy(), steps_per_execution=2)
    return model


def shared() -> Any:
    """Reads a weight several times, so that its gradient is summed in another order."""
    keras.utils.set_random_seed(7)
    layer, inputs = L.Dense(20, "tanh", kernel_regularizer="l2"), keras.Input((20,))
    model = keras.Model(inputs, L.Dense(3)(layer(layer(inputs))))
    model.compile(clipped_sgd(), crossentropy())
    return model


@check(MULTI_WORKER, full=(MIRRORED, HOROVOD))
def zero_3_has_the_bits_of_plain_training_and_half_of_all(folder: Path) -> None:
    options = {"epochs": 1, "validation_data": table(33)}
    whole = Live()
    expected = train(wide(), 0, whole, **options)
    parts = Live()
    assert_same_bits(train(wide(), GATHERED, parts, **options), expected)
    # On several devices of one process, plain training keeps its first variables too.
    assert 0.3 < parts.bytes / whole.bytes < 0.55, parts.bytes / whole.bytes


@check(MIRRORED)
def zero_3_lets_callbacks_read_and_write_weights_of_one_process(folder: Path) -> None:
    class Halves(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.model.predict(table(8)[0], verbose=0)
            self.model.set_weights([value / 2 for value in self.model.get_weights()])

    assert_close(train(shared(), 3, Halves()), train(shared(), 0, Halves()))


@check(MIRRORED)
def model_parallel_trains_as_one_process(folder: Path) -> None:
    names = ("batch", "model")
    mesh = keras.distribution.DeviceMesh((1, 2), names, keras.distribution.list_devices())
    layouts = keras.distribution.LayoutMap(mesh)
    layouts[".*kernel"] = (None, "model")
    ours = keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
    expected = train(shared(), 0)
    keras.distribution.set_distribution(ours)  # as a script for JAX does
    try:
        assert_close(train(shared(), "auto"), expected)
    finally:
        keras.distribution.set_distribution(None)


@check(HOROVOD, full=(MULTI_WORKER,))
def zero_3_saves_whole_weights_at_the_end_of_an_epoch(folder: Path) -> None:
    path = str(folder / "epoch-{epoch}.keras")
    expected = train(adam(), 3, keras.callbacks.ModelCheckpoint(path), epochs=1)
    everywhere(None)
    assert_same_bits(state_of(keras.saving.load_model(path.format(epoch=1))), expected)


@check(MULTI_WORKER)
def zero_3_says_that_weights_were_lost(folder: Path) -> None:
    model = adam()
    weights = model.get_weights()
    lost = mock.patch.object(slots, "all_ended", return_value=False)
    with lost, pytest.raises(StoppedError) as stopped:
        train(model, 3, Stop(2))
    assert "cannot join them" in stopped.value.__notes__[0]
    with pytest.raises(StrategyError, match="must have its value"):
        model.get_weights()
    with pytest.raises(StrategyError, match="must have its value"):
        model.predict(table(3)[0], verbose=0)
    model.set_weights(weights)
    assert_same_bits(model.get_weights(), weights)
