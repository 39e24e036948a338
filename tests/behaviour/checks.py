"""What must hold in a single process and on every worker of a cluster alike.

Each check is a function of a folder that all workers share.
"""

from __future__ import annotations

import contextlib
import csv
import io
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfdist
from tests.behaviour.registry import (
    HOROVOD,
    MIRRORED,
    MULTI_WORKER,
    SERVERS,
    SINGLE,
    WORKERS,
    check,
)
from tests.equivalence.cases import clipped_sgd, crossentropy, mlp, table
from tfdist import samplers
from tfdist.errors import DisagreementError
from tfdist.strategies import tf_distribute

L = keras.layers


def place() -> Any:
    return tfdist.strategies.session.current().strategy.place


def everywhere(value: Any) -> list[Any]:
    return tfdist.strategies.session.current().strategy.gather_objects(value)


def same_everywhere(model: Any) -> None:
    first, *others = everywhere([np.asarray(v) for v in model.variables])
    for other in others:
        for a, b in zip(first, other, strict=True):
            np.testing.assert_array_equal(a, b)


def assert_weights_close(model: Any, expected: Any, tolerance: float = 1e-5) -> None:
    for ours, theirs in zip(model.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


def twins(optimizer: Callable[[], Any] = clipped_sgd) -> tuple[Any, Any]:
    """Two models with the same weights, to train one with tfdist and one with Keras."""
    ours, theirs = (mlp(optimizer()) for _ in range(2))
    theirs.set_weights(ours.get_weights())
    theirs.optimizer.build(theirs.trainable_variables)  # or Keras traces its first step twice
    return ours, theirs


def level(model: Any, expected: Any) -> None:
    """Gives a model the state of the other, to compare trainings from there."""
    for one in (model, expected):
        if not one.optimizer.built:
            one.optimizer.build(one.trainable_variables)
    for ours, theirs in zip(
        (*model.variables, *model.optimizer.variables),
        (*expected.variables, *expected.optimizer.variables),
        strict=True,
    ):
        ours.assign(theirs)


ORDERED = {"batch_size": 64, "shuffle": False, "verbose": 0}


@check(SINGLE, full=(MIRRORED, *WORKERS, SERVERS))
def equals_plain_keras(folder: Path) -> None:
    ours, theirs = twins()
    options = {**ORDERED, "epochs": 2, "validation_split": 0.1}
    a = tfdist.fit(ours, *table(), **options)
    b = theirs.fit(*table(), **options)
    assert_weights_close(ours, theirs)
    assert a.history.keys() == b.history.keys()
    for name in a.history:
        np.testing.assert_allclose(a.history[name], b.history[name], rtol=1e-5)


@check(MIRRORED, full=WORKERS)
def float16_overflows_where_it_does_in_plain_keras(folder: Path) -> None:
    keras.mixed_precision.set_global_policy("mixed_float16")
    try:
        scaled = keras.optimizers.LossScaleOptimizer
        ours, theirs = twins(lambda: scaled(keras.optimizers.SGD(1e-4), 2.0**20))
        tfdist.fit(ours, *table(300), **ORDERED, epochs=4)
        theirs.fit(*table(300), **ORDERED, epochs=4)
    finally:
        keras.mixed_precision.set_global_policy("float32")
    counts = [int(model.optimizer.inner_optimizer.iterations) for model in (ours, theirs)]
    assert counts[0] == counts[1] < 20  # steps, of which the first ones are skipped
    assert_weights_close(ours, theirs, 1e-6)


@check(MIRRORED, full=(SINGLE, *WORKERS, SERVERS))
def evaluate_counts_each_example_once(folder: Path) -> None:
    model = mlp(
        clipped_sgd(),
        metrics=["accuracy", keras.metrics.SparseCategoricalCrossentropy(from_logits=True)],
    )
    for rows in (1, 3, 7, 300):
        x, y = table(rows)
        expected = model.evaluate(x, y, batch_size=4, verbose=0)
        received = tfdist.evaluate(model, x, y, batch_size=4, verbose=0)
        np.testing.assert_allclose(received, expected, rtol=1e-5)
    named = tfdist.evaluate(model, *table(9), verbose=0, return_dict=True)
    assert list(named) == ["accuracy", "loss", "sparse_categorical_crossentropy"]


@check(MULTI_WORKER, SERVERS, full=(SINGLE, MIRRORED, HOROVOD))
def predictions_are_in_order(folder: Path) -> None:
    model = mlp(clipped_sgd())
    for rows in (1, 3, 7, 300):
        x, _ = table(rows)
        expected = model.predict(x, verbose=0)
        np.testing.assert_allclose(
            tfdist.predict(model, x, batch_size=4, verbose=0), expected, rtol=1e-5, atol=1e-6
        )
    dataset = tf.data.Dataset.from_tensor_slices(x).batch(7)
    np.testing.assert_allclose(
        tfdist.predict(model, dataset, verbose=0), expected, rtol=1e-5, atol=1e-6
    )


class Remembering(L.Layer):
    """Keeps a moving mean of its batches, when it predicts too."""

    def build(self, shape: Any) -> None:
        self.mean = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, x: Any) -> Any:
        self.mean.assign(0.5 * self.mean + 0.5 * keras.ops.mean(x))
        return x


@check(HOROVOD, full=(MIRRORED, SERVERS))
def predictions_of_whole_batches(folder: Path) -> None:
    """Outputs that are no rows of their own are those of one process, in number too."""
    inputs, ops = keras.Input((20,)), keras.ops
    remembering = Remembering()
    models = [
        keras.Model(inputs, L.Dense(2)(inputs - ops.mean(inputs, 0, keepdims=True))),
        keras.Model(inputs, {"a": ops.reshape(inputs, (-1, 1)), "b": L.Dense(1)(inputs)}),
        keras.Model(inputs, ops.sum(inputs, 0)),
        keras.Model(inputs, L.Dense(1)(remembering(inputs))),
    ]
    x, _ = table(22)
    for model in models:
        expected = keras.tree.flatten(model.predict(x, batch_size=8, verbose=0))
        kept, _ = float(remembering.mean), remembering.mean.assign(0.0)
        received = tfdist.predict(model, x, batch_size=8, verbose=0)
        for here, there in zip(keras.tree.flatten(received), expected, strict=True):
            np.testing.assert_allclose(here, there, rtol=1e-5, atol=1e-6)
    assert float(remembering.mean) == pytest.approx(kept, rel=1e-5)


@check(MIRRORED)
def a_model_without_an_input_is_shared(folder: Path) -> None:
    """Keras builds it for the size of the first batch, which each replica has a part of."""
    rows = []

    class Counted(L.Layer):
        def call(self, x: Any) -> Any:
            if tf.executing_eagerly() is False:
                rows.append(x.shape[0])
            return x

    models = []
    for _ in range(2):
        keras.utils.set_random_seed(1)
        models.append(keras.Sequential([Counted(), L.Dense(3)]))
        models[-1].compile(clipped_sgd(), "mse")
    ours, expected = models
    x, y = np.random.rand(64, 5).astype("float32"), np.random.rand(64, 3).astype("float32")
    tfdist.fit(ours, x, y, batch_size=16, shuffle=False, verbose=0)
    assert {8} <= set(rows), rows
    expected.fit(x, y, batch_size=16, shuffle=False, verbose=0)
    assert_weights_close(ours, expected)


@check(MIRRORED)
def a_variable_is_a_number_in_a_callback(folder: Path) -> None:
    model, found = mlp(clipped_sgd()), []

    def note(epoch: int, logs: Any) -> None:
        optimizer = model.optimizer
        found.append((int(optimizer.iterations), float(optimizer.learning_rate)))

    noting = keras.callbacks.LambdaCallback(on_epoch_end=note)
    tfdist.fit(model, *table(64), batch_size=16, verbose=0, callbacks=[noting])
    assert found == [(4, pytest.approx(float(model.optimizer.learning_rate)))]
    with pytest.raises(TypeError, match=r"^[Oo]nly|scalar"):
        int(model.layers[0].kernel)


@check(HOROVOD)
def predicts_nested_outputs_without_compiling(folder: Path) -> None:
    inputs = keras.Input((20,))
    model = keras.Model(inputs, {"a": L.Dense(2)(inputs), "b": L.Dense(1)(inputs)})
    x, _ = table(11)
    expected = model.predict(x, verbose=0)
    received = tfdist.predict(model, x, batch_size=3, verbose=0)
    for name in ("a", "b"):
        np.testing.assert_allclose(received[name], expected[name], rtol=1e-5, atol=1e-6)


@check(MULTI_WORKER, full=(SERVERS,))
def per_class_metrics_are_exact(folder: Path) -> None:
    from sklearn import metrics as skl

    x, y = table(307)
    x, y = x[(y > 0) | (np.arange(307) % 9 == 0)], y[(y > 0) | (np.arange(307) % 9 == 0)]
    model = mlp(clipped_sgd())
    picture = folder / "pictures" / "confusion.png"
    metrics = tfdist.PerClassMetrics(x, y, batch_size=60, picture=picture)
    stop = keras.callbacks.EarlyStopping("val_recall_0", mode="max", min_delta=2, patience=2)
    history = tfdist.fit(
        model, x, y, batch_size=64, epochs=6, callbacks=[metrics, stop], verbose=0
    ).history
    assert len(history["val_recall_0"]) == 3  # no recall gains 2: the callback was heard
    predicted = model.predict(x, verbose=0).argmax(1)
    np.testing.assert_array_equal(metrics.confusion, skl.confusion_matrix(y, predicted))
    expected = skl.precision_recall_fscore_support(y, predicted, zero_division=0)
    for name, values in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        found = [history[f"val_{name}_{c}"][-1] for c in range(3)]
        np.testing.assert_allclose(found, values, rtol=1e-12)
    balanced = skl.balanced_accuracy_score(y, predicted)
    assert history["val_balanced_accuracy"][-1] == pytest.approx(balanced, rel=1e-12)
    assert history["val_macro_f1"][-1] == pytest.approx(expected[2].mean(), rel=1e-12)
    assert everywhere(history) == [history] * len(everywhere(0))
    assert picture.stat().st_size > 1000


@check(HOROVOD)
def a_stop_in_the_last_step_survives_per_class_metrics(folder: Path) -> None:
    class Asks(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.model.stop_training = batch == 4

    x, y = table(320)
    metrics = tfdist.PerClassMetrics(x, y)
    history = tfdist.fit(
        mlp("sgd"), x, y, batch_size=64, epochs=3, callbacks=[Asks(), metrics], verbose=0
    )
    assert len(history.epoch) == 1


@check(MIRRORED, full=WORKERS)
def unsynchronized_batch_norm_agrees_and_is_finite(folder: Path) -> None:
    model = keras.Sequential([keras.Input((20,)), L.BatchNormalization(), L.Dense(3)])
    model.compile("adam", crossentropy())
    tfdist.fit(model, *table(961), batch_size=64, epochs=2, verbose=0)  # last batch: 1 row
    assert all(np.isfinite(w).all() for w in model.get_weights())
    same_everywhere(model)


@check(HOROVOD, full=(SERVERS,))
def early_stopping_and_plateau_decide_alike(folder: Path) -> None:
    ours, theirs = twins()

    def callbacks() -> list[Any]:
        return [
            keras.callbacks.EarlyStopping("val_loss", min_delta=0.05, patience=1),
            keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=0.1),
            keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.9),
        ]

    options = {**ORDERED, "epochs": 12, "validation_split": 0.2}
    a = tfdist.fit(ours, *table(), callbacks=callbacks(), **options)
    b = theirs.fit(*table(), callbacks=callbacks(), **options)
    assert len(a.history["loss"]) == len(b.history["loss"]) < 12
    np.testing.assert_allclose(
        a.history["learning_rate"], b.history["learning_rate"], rtol=1e-6
    )
    # In so many steps Adam makes much of last bits; another decision would change 1e-2.
    assert_weights_close(ours, theirs, 1e-3)
    same_everywhere(ours)


class StopAt(keras.callbacks.Callback):
    def __init__(self, batch: int, worker: int | None) -> None:
        super().__init__()
        self.batch, self.worker = batch, worker
        self.ended = 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.ended += 1
        if batch == self.batch and self.worker in (None, place().worker_index):
            self.model.stop_training = True


@check(MULTI_WORKER, full=(SINGLE, HOROVOD, SERVERS))
def a_stop_on_any_worker_takes_effect_at_the_same_step(folder: Path) -> None:
    last = 15  # of batches 0 to 15: then the epoch's end has to carry the news
    ours, theirs = twins()
    for batch in (0, 5, last):
        for worker in (None, place().num_workers - 1)[: place().num_workers]:
            level(ours, theirs)
            before = int(theirs.optimizer.iterations)
            stop = StopAt(batch, worker)
            history = tfdist.fit(ours, *table(), callbacks=[stop], epochs=2, **ORDERED)
            theirs.fit(*table(), callbacks=[StopAt(batch, None)], epochs=2, **ORDERED)
            made = [int(model.optimizer.iterations) - before for model in (ours, theirs)]
            assert made == [batch + 1] * 2
            assert len(history.history["loss"]) == 1
            assert stop.ended == batch + 1
            assert_weights_close(ours, theirs)
            same_everywhere(ours)


@check(MULTI_WORKER, full=(MIRRORED,))
def a_model_of_many_packs_trains_and_stops_as_one_process(folder: Path) -> None:
    ours, theirs = twins()
    with mock.patch.multiple(tf_distribute, SIGNALS_LEAD=0, PACK_BYTES=256):
        stop = StopAt(5, place().num_workers - 1)
        tfdist.fit(ours, *table(), callbacks=[stop], **ORDERED)
    theirs.fit(*table(), callbacks=[StopAt(5, None)], **ORDERED)
    assert int(ours.optimizer.iterations) == int(theirs.optimizer.iterations) == 6
    assert_weights_close(ours, theirs)
    same_everywhere(ours)


@check(MIRRORED, full=(MULTI_WORKER,))
def terminate_on_nan_stops_everywhere(folder: Path) -> None:
    x, y = table()
    x[130] = np.nan  # on one replica
    ours, theirs = twins()
    for fit in (lambda *a, **o: tfdist.fit(ours, *a, **o), theirs.fit):
        fit(x, y, callbacks=[keras.callbacks.TerminateOnNaN()], epochs=2, **ORDERED)
    assert int(ours.optimizer.iterations) == int(theirs.optimizer.iterations) < 16


@check(HOROVOD, full=(MULTI_WORKER,))
def only_the_chief_writes(folder: Path) -> None:
    model = mlp(clipped_sgd())
    tfdist.fit(
        model,
        *table(),
        epochs=3,
        callbacks=[
            keras.callbacks.ModelCheckpoint(folder / "{epoch}.keras"),
            keras.callbacks.CSVLogger(folder / "log.csv"),
            keras.callbacks.TensorBoard(folder / "board", write_graph=False),
        ],
        **ORDERED,
    )
    everywhere(None)  # the chief is done writing
    assert sorted(p.name for p in folder.glob("*.keras")) == [f"{e}.keras" for e in (1, 2, 3)]
    with (folder / "log.csv").open() as lines:
        assert [row["epoch"] for row in csv.DictReader(lines)] == ["0", "1", "2"]
    assert len(list(folder.glob("board/train/events*"))) == 1
    loaded = keras.models.load_model(folder / "3.keras")
    assert_weights_close(loaded, model, 0)

    def fails(epoch: int, logs: Any) -> None:
        raise FileExistsError(folder)

    once = keras.callbacks.LambdaCallback(on_epoch_end=fails)
    with pytest.raises(FileExistsError) as caught:
        tfdist.fit(model, *table(), callbacks=[once], **ORDERED)
    assert "`if tfdist.is_chief(): ...`" in caught.value.__notes__[-1]


class Fails(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if epoch == 2:
            raise KeyboardInterrupt


@check(MULTI_WORKER, full=(SERVERS,))
def backup_and_restore_continues_on_all_workers(folder: Path) -> None:
    whole = mlp(clipped_sgd())
    started = whole.get_weights()
    tfdist.fit(whole, *table(), epochs=4, batch_size=64, seed=3, verbose=0)
    first, second = mlp(clipped_sgd()), mlp(clipped_sgd())
    first.set_weights(started)
    backup = folder / "backup"
    with pytest.raises(KeyboardInterrupt):
        tfdist.fit(
            first, *table(), epochs=4, batch_size=64, seed=3, verbose=0,
            callbacks=[keras.callbacks.BackupAndRestore(backup), Fails()],
        )  # fmt: skip
    history = tfdist.fit(
        second, *table(), epochs=4, batch_size=64, seed=3, verbose=0,
        callbacks=[keras.callbacks.BackupAndRestore(backup)],
    )  # fmt: skip
    assert history.epoch == [2, 3]
    assert_weights_close(second, whole)
    same_everywhere(second)


class Looks(keras.callbacks.Callback):
    """Evaluates and predicts on data of its own while training goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        x, y = table(50)
        self.seen.append(
            (
                self.model.evaluate(x, y, verbose=0)[0],
                float(self.model.predict(x, verbose=0).sum()),
            )
        )


class LooksOnAllReplicas(Looks):
    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        x, y = table(50)
        loss, _ = tfdist.evaluate(self.model, x, y, verbose=0)
        self.seen.append((loss, float(tfdist.predict(self.model, x, verbose=0).sum())))


@check(HOROVOD, full=(MIRRORED, SERVERS))
def callbacks_may_evaluate_and_predict(folder: Path) -> None:
    ours, theirs = twins()
    a, b, c = Looks(), Looks(), LooksOnAllReplicas()
    history = tfdist.fit(ours, *table(), callbacks=[c, a], epochs=2, **ORDERED)
    expected = theirs.fit(*table(), callbacks=[b], epochs=2, **ORDERED)
    np.testing.assert_allclose(a.seen, b.seen, rtol=1e-4)
    np.testing.assert_allclose(c.seen, b.seen, rtol=1e-4)
    np.testing.assert_allclose(history.history["loss"], expected.history["loss"], rtol=1e-4)


class Counting(keras.Model):
    """Counts how often it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = L.Dense(3)
        self.calls = 0

    def call(self, x: Any) -> Any:
        self.calls += 1
        return self.dense(x)


@check(MIRRORED, full=(SINGLE, HOROVOD, SERVERS))
def a_second_fit_traces_nothing(folder: Path) -> None:
    model = Counting()
    model.compile(clipped_sgd(), crossentropy())
    tfdist.fit(model, *table(), validation_data=table(100), **ORDERED)
    traced = model.calls
    tfdist.fit(model, *table(), validation_data=table(100), **ORDERED)
    assert model.calls == traced
    model.compile("sgd", crossentropy())
    tfdist.fit(model, *table(), **ORDERED)
    assert model.calls > traced


@check(MIRRORED, full=(MULTI_WORKER, SERVERS))
def the_model_is_plain_keras_again(folder: Path) -> None:
    model = mlp(clipped_sgd())
    optimizer = model.optimizer
    tfdist.fit(model, *table(), **ORDERED)
    assert model.optimizer is optimizer
    assert int(optimizer.iterations) == 16
    model.fit(*table(64), batch_size=64, verbose=0)
    assert int(optimizer.iterations) == 17
    file = folder / f"{place().worker_index}.keras"
    model.save(file)
    loaded = keras.models.load_model(file)
    assert_weights_close(loaded, model, 0)
    assert int(loaded.optimizer.iterations) == 17
    assert "scale_loss" not in vars(optimizer)


@check(SINGLE)
def pandas_frames(folder: Path) -> None:
    import pandas

    ours, theirs = twins()
    x, y = table()
    frame, series = pandas.DataFrame(x.astype("float64")), pandas.Series(y)
    tfdist.fit(ours, frame, series, **ORDERED)
    theirs.fit(x, y, **ORDERED)
    assert_weights_close(ours, theirs)


@check(MIRRORED, full=(MULTI_WORKER, SERVERS))
def eagerly_too(folder: Path) -> None:
    ours, theirs = twins()
    ours.run_eagerly = True
    small = table(100)
    tfdist.fit(ours, *small, **ORDERED)
    theirs.fit(*small, **ORDERED)
    assert_weights_close(ours, theirs)
    np.testing.assert_allclose(
        tfdist.predict(ours, small[0], verbose=0),
        theirs.predict(small[0], verbose=0),
        1e-4,
        1e-5,
    )


@check(SINGLE)
def initial_epoch_continues_the_sampler(folder: Path) -> None:
    whole, halves = twins()
    tfdist.fit(whole, *table(), batch_size=64, epochs=4, seed=3, verbose=0)
    tfdist.fit(halves, *table(), batch_size=64, epochs=2, seed=3, verbose=0)
    tfdist.fit(halves, *table(), batch_size=64, initial_epoch=2, epochs=4, seed=3, verbose=0)
    assert_weights_close(halves, whole)


# --- what must be refused ---------------------------------------------------------------


def refused(error: type[Exception], *words: str, **arguments: Any) -> None:
    model = arguments.pop("model", None) or mlp(clipped_sgd())
    before = model.get_weights()
    with pytest.raises(error) as caught:
        tfdist.fit(model, verbose=0, **arguments)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert int(model.optimizer.iterations) == 0
    for ours, theirs in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def mine(value: Any, other: Any) -> Any:
    """Gives the last worker another value than the rest."""
    return other if place().worker_index == place().num_workers - 1 else value


@check(MULTI_WORKER, full=(HOROVOD,))
def workers_that_disagree_are_named(folder: Path) -> None:
    x, y = table(100)
    refused(DisagreementError, "batch_size", "worker 1: 16", x=x, y=y, batch_size=mine(32, 16))
    refused(DisagreementError, "epochs", "worker 1: 3", x=x, y=y, epochs=mine(2, 3))
    some, changed = mine(100, 99), y.copy()
    changed[mine(slice(0), slice(61, 70))] += 1
    refused(DisagreementError, "of x: ", "worker 1: (99, 20)", x=x[:some], y=y[:some])
    refused(DisagreementError, "x, of shape (100, 20): row 0", x=x + mine(0.0, 1.0), y=y)
    inputs = {"a": keras.Input((20,)), "b": keras.Input(())}
    joined = L.Concatenate()([inputs["a"], L.Reshape((1,))(inputs["b"])])
    named = keras.Model(inputs, L.Dense(3)(joined))
    named.compile("sgd", crossentropy())
    words = "values of x['b']", "row 61", "that worker 1 has", "; y differs too"
    refused(DisagreementError, *words, model=named, x={"a": x, "b": changed}, y=changed)
    labels = {"sampler": samplers.ClassBalanced(labels=mine(y, 2 - y))}
    refused(DisagreementError, "the same data", "worker 1: 100 rows", x=x, y=y, **labels)
    small = keras.Sequential([keras.Input((20,)), L.Dense(mine(3, 4))])
    small.compile("sgd", crossentropy())
    refused(DisagreementError, "model", "(20, 4)", model=small, x=x, y=y)


@check(HOROVOD, full=(MULTI_WORKER,))
def workers_that_draw_different_batches_are_named(folder: Path) -> None:
    seed = place().worker_index
    dataset = tf.data.Dataset.from_tensor_slices(table(100)).shuffle(100, seed=seed).batch(10)
    refused(DisagreementError, "shuffle", "worker 1", x=dataset)
    # The same at first, and different later: found at the step that differs.
    x, y = table(100)
    x[55:] += mine(0.0, 1.0)
    model = mlp(clipped_sgd())
    late = tf.data.Dataset.from_tensor_slices((x, y)).batch(10)
    with pytest.raises(DisagreementError):
        tfdist.fit(model, late, verbose=0)
    assert int(model.optimizer.iterations) == 5


@check(MULTI_WORKER, full=(HOROVOD,))
def only_the_chief_shows_progress(folder: Path) -> None:
    me = place().worker_index
    assert tfdist.is_chief() == (me == 0)
    model = mlp("sgd")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        tfdist.fit(model, *table(), batch_size=64, epochs=2, verbose=2)
        tfdist.evaluate(model, *table(), verbose=2)
        tfdist.predict(model, table()[0], verbose=2)
    lines = printed.getvalue().splitlines()
    if me > 0:
        assert lines == []
        return
    assert [line for line in lines if line.startswith("Epoch")] == ["Epoch 1/2", "Epoch 2/2"]
    assert "2 replicas, batch 64 = 32 + 32" in lines[0]


@check(MIRRORED, full=(MULTI_WORKER,))
def learning_rate_is_scaled_and_warmed_up(folder: Path) -> None:
    replicas = place().num_replicas
    model, seen = mlp(keras.optimizers.SGD(0.1, momentum=0.9)), []
    note = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(
            float(model.optimizer.learning_rate.numpy())
        )
    )
    callbacks = [tfdist.LearningRateWarmup(2), note, tfdist.LearningRateScaling()]
    tfdist.fit(model, *table(256), epochs=3, callbacks=callbacks, **ORDERED)
    factors = 1 / replicas + (1 - 1 / replicas) * np.minimum(np.arange(12) / 8, 1.0)
    np.testing.assert_allclose(seen, 0.1 * replicas * factors, rtol=1e-5)
    np.testing.assert_allclose(model.optimizer.learning_rate.numpy(), 0.1, rtol=1e-6)
    same_everywhere(model)


@check(SINGLE, full=(MULTI_WORKER,))
def seeds_make_it_repeatable(folder: Path) -> None:
    def train(**options: Any) -> Any:
        model = mlp("sgd")
        return tfdist.fit(model, *table(), batch_size=64, verbose=0, **options).history

    tfdist.init(seed=1)
    first = train()
    assert train() != first
    tfdist.init(seed=1)
    assert train() == first
    keras.utils.set_random_seed(1)  # as in a script that knows nothing of tfdist
    assert train(seed=2) != first


@check(MULTI_WORKER, full=(MIRRORED, SERVERS))
def drop_in_and_back(folder: Path) -> None:
    ours, theirs = twins()
    theirs.fit(*table(), epochs=2, validation_split=0.1, **ORDERED)
    fit = keras.Model.fit
    handle = tfdist.drop_in()
    assert keras.Model.fit is not fit
    history = ours.fit(*table(), epochs=2, validation_split=0.1, **ORDERED)
    scores = ours.evaluate(*table(), verbose=0)
    outputs = ours.predict(table()[0], verbose=0)
    shared = folder / "shared.keras"
    ours.save(shared)
    ours.save_weights(folder / "shared.weights.h5")
    loaded = keras.models.load_model(shared)
    handle.undo()
    handle.undo()
    assert keras.Model.fit is fit
    assert len(history.history["val_loss"]) == 2
    assert_weights_close(ours, theirs)
    assert_weights_close(loaded, ours, 0)
    np.testing.assert_allclose(scores, theirs.evaluate(*table(), verbose=0), rtol=1e-4)
    np.testing.assert_allclose(outputs, theirs.predict(table()[0], verbose=0), 1e-3, 1e-4)
    everywhere(None)
    assert not list(folder.glob(".saving-*"))


class Slow(keras.callbacks.Callback):
    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        time.sleep(0.02 * place().worker_index)


@check(*WORKERS)
def a_slow_worker_is_waited_for(folder: Path) -> None:
    ours, theirs = twins()
    tfdist.fit(ours, *table(), callbacks=[Slow()], **ORDERED)
    theirs.fit(*table(), **ORDERED)
    assert_weights_close(ours, theirs)


@check(*WORKERS)
def notes_in_the_store_reach_all_workers(folder: Path) -> None:
    store = tfdist.strategies.session.current().strategy.key_value_store()
    me, last = place().worker_index, place().num_workers - 1
    everyone = {i: f"ü {i}" for i in range(last + 1)}
    assert store.read("none") is None
    for text in ("old", f"ü {me}"):  # a note replaces the one before
        assert store.post(f"note/{me}", text)
        assert store.post("note", text)  # no folder of the others
    everywhere(None)
    assert store.read_all("note") == everyone
    assert store.read_all("not") == {}
    # While the main thread waits in a collective, another goes on with the key_value_store.
    if me != last:
        late = threading.Timer(0.5, lambda: store.post(f"waiting/{me}", "x" * 100_000))
        late.start()
    else:
        deadline = time.monotonic() + 20
        while len(store.read_all("waiting")) < last and time.monotonic() < deadline:
            time.sleep(0.1)
        assert store.read_all("waiting") == dict.fromkeys(range(last), "x" * 100000)
    everywhere(None)


class Meddles(keras.callbacks.Callback):
    """Changes a weight of the last replica by the least bit, after one step."""

    def __init__(self, epoch: int, step: int) -> None:
        super().__init__()
        self.when = (epoch, step)
        self.strategy = tfdist.strategies.session.current().strategy
        self.epoch = 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        place = self.strategy.place
        is_last = place.worker_index == place.num_workers - 1
        if self.when != (self.epoch, batch + 1) or not is_last:
            return
        variable = self.model.trainable_variables[2].value
        if place.local_replicas > 1:
            variable = self.strategy.strategy.experimental_local_results(variable)[-1]
        changed = variable.numpy()
        changed.flat[3] = np.nextafter(changed.flat[3], np.float32(9))
        variable.assign(changed)


@check(MULTI_WORKER, full=(MIRRORED,))
def replicas_that_differ_are_named(folder: Path) -> None:
    fit = {"batch_size": 64, "epochs": 2, "verbose": 0, "verify_every": 5}
    ours, theirs = twins()
    shown = [keras.callbacks.ReduceLROnPlateau("loss")]
    tfdist.fit(ours, *table(), validation_data=table(50), callbacks=shown, seed=3, **fit)
    tfdist.fit(
        theirs, *table(), validation_data=table(50), seed=3, **{**fit, "verify_every": None}
    )
    assert_weights_close(ours, theirs, 0)  # looking changes nothing
    who = f"worker {place().num_workers - 1}" if place().num_workers > 1 else "replica 1"
    for epoch, step, found in (
        (0, 7, "after step 10 of epoch 1"),
        (1, 4, "after step 4 of epoch 2"),
        (1, 16, "at the end of training"),
    ):
        ours.set_weights(theirs.get_weights())  # the same on all again
        with pytest.raises(DisagreementError) as caught:
            tfdist.fit(ours, *table(), callbacks=[Meddles(epoch, step)], **fit)
        for word in (found, f"`{ours.trainable_variables[2].path}`", who):
            assert word in str(caught.value), (word, str(caught.value))


@check(MULTI_WORKER, full=(HOROVOD,))
def a_worker_that_holds_the_others_back_is_named(folder: Path) -> None:
    me = place().worker_index

    def late(x: Any) -> Any:
        time.sleep(0.12 * (me == 1))
        return x

    class Late(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            late(None)

    def slow(x: Any, y: Any) -> Any:
        slowed = tf.numpy_function(late, [x], tf.float32)
        return tf.ensure_shape(slowed, x.shape), y

    def said(*data: Any, **options: Any) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            tfdist.fit(mlp("sgd"), *data, epochs=2, verbose=2, **options)
        return printed.getvalue()

    board = keras.callbacks.TensorBoard(folder / "board", write_graph=False)
    printed = said(*table(), batch_size=64, callbacks=[Late(), board])
    assert ("worker 1 holds the others back" in printed) == (me == 0), printed
    assert "for its data" not in printed
    rows = tf.data.Dataset.from_tensor_slices(table()).batch(64)
    printed = said(rows.map(slow))
    assert ("for its data" in printed) == (me == 0), printed
    assert "by worker" not in said(*table(), batch_size=64)  # nothing to speak of was lost
    everywhere(None)
    (events,) = folder.glob("board/workers/events*")
    written = {
        value.tag: float(tf.make_ndarray(value.tensor))
        for event in tf.compat.v1.train.summary_iterator(str(events))
        for value in event.summary.value
    }
    assert written["worker_1/work_ms_median"] > 50
    assert written["worker_0/waiting_ms_median"] > 25
    assert written["worker_0/step_ms_p95"] >= written["worker_0/step_ms_median"] > 50
