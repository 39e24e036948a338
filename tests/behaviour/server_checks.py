"""What must hold of parameter servers; the program's own strategy is the synchronous one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfdist
from tests.behaviour.checks import ORDERED, assert_weights_close, twins
from tests.behaviour.registry import SERVERS, check
from tests.equivalence.cases import (
    Adversaries,
    Pages,
    clipped_sgd,
    crossentropy,
    images,
    mlp,
    sequences,
    table,
)
from tfdist.errors import ArgumentError

L = keras.layers


def asynchronous(**options: Any) -> Any:
    return tfdist.ParameterServer(**{"min_part_bytes": 256, **options})


@check(SERVERS)
def one_step_at_a_time_equals_one_process(folder: Path) -> None:
    for data in ("chief", "workers"):
        ours, theirs = twins()
        options = {**ORDERED, "epochs": 2, "validation_split": 0.1}
        strategy = asynchronous(max_staleness=0, data=data)
        a = tfdist.fit(ours, *table(), **options, strategy=strategy)
        b = theirs.fit(*table(), **options)
        assert_weights_close(ours, theirs)
        for name in b.history:
            np.testing.assert_allclose(a.history[name], b.history[name], rtol=1e-5)
        steps = len(range(0, 864, 64)) * 2
        assert (strategy.staleness.updates, strategy.staleness.maximum) == (steps, 0)


class Constant(keras.Model):
    """The gradient is 1 wherever the weight is: its end counts the updates."""

    def __init__(self) -> None:
        super().__init__()
        self.w = self.add_weight(shape=(4,), initializer="zeros", name="w")

    def call(self, x: Any) -> Any:
        return x * 0 + self.w

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):  # type: ignore[no-untyped-def]
        return tf.reduce_sum(self.w)


@check(SERVERS)
def no_update_is_lost(folder: Path) -> None:
    for optimizer in (keras.optimizers.SGD(1.0), keras.optimizers.SGD(1.0, momentum=1e-9)):
        model = Constant()
        model.build((None, 4))
        model.compile(optimizer)
        x = np.ones((600, 4), "float32")
        strategy = asynchronous()
        tfdist.fit(model, x, batch_size=3, epochs=2, verbose=0, strategy=strategy)
        np.testing.assert_allclose(model.w.numpy(), -400.0, rtol=1e-6)
        assert int(model.optimizer.iterations.numpy()) == 400
        assert strategy.staleness.updates == 400


@check(SERVERS)
def metrics_count_every_example_once(folder: Path) -> None:
    model = mlp(clipped_sgd(), metrics=["accuracy", Rows()])
    x, y = table(501)
    strategy = asynchronous()
    history = tfdist.fit(
        model, x, y, batch_size=7, epochs=2, verbose=0, strategy=strategy
    ).history
    assert history["rows"] == [501.0, 501.0]
    assert max(history["accuracy"]) <= 1.0
    expected = model.evaluate(x, y, verbose=0)
    received = tfdist.evaluate(model, x, y, batch_size=7, verbose=0, strategy=strategy)
    assert strategy.staleness.updates == 144  # of `fit`, after an evaluation too
    np.testing.assert_allclose(received, expected, rtol=1e-5)
    np.testing.assert_allclose(
        tfdist.predict(model, x, batch_size=7, verbose=0, strategy=asynchronous()),
        model.predict(x, verbose=0),
        rtol=1e-5,
        atol=1e-6,
    )


class Rows(keras.metrics.Metric):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(name="rows")
        self.count = self.add_weight(shape=(), initializer="zeros", name="count")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        self.count.assign_add(tf.cast(tf.shape(y_pred)[0], tf.float32))

    def result(self) -> Any:
        return self.count.value


@check(SERVERS)
def optimizers_learn_and_stay_finite(folder: Path) -> None:
    """One of each kind: no slots, means of squares, a count, signs, factors, norms."""
    for name in ("SGD", "Adadelta", "Nadam", "Lion", "Adafactor", "Lamb"):
        rate = 0.1 if name in ("Adadelta", "Ftrl") else 0.01
        model = mlp(getattr(keras.optimizers, name)(rate))
        options = {"batch_size": 16, "epochs": 2, "verbose": 0, "strategy": asynchronous()}
        losses = tfdist.fit(model, *table(331), **options).history["loss"]
        assert all(np.isfinite(w).all() for w in model.get_weights()), name
        assert losses[1] < losses[0], (name, losses)


@check(SERVERS)
def options_of_optimizers_work_with_stale_weights(folder: Path) -> None:
    optimizers = [
        keras.optimizers.AdamW(0.01, weight_decay=0.01, use_ema=True, ema_momentum=0.5),
        keras.optimizers.Adam(0.01, gradient_accumulation_steps=3),
        keras.optimizers.LossScaleOptimizer(
            keras.optimizers.Adam(0.01), initial_scale=2.0**127, dynamic_growth_steps=4
        ),
    ]
    for optimizer in optimizers:
        model = mlp(optimizer)
        tfdist.fit(
            model, *table(331), batch_size=16, epochs=2, verbose=0, strategy=asynchronous()
        )
        assert all(np.isfinite(w).all() for w in model.get_weights())
        assert model.evaluate(*table(331), verbose=0)[0] < 1.0  # log(3) = 1.1 before


@check(SERVERS)
def rows_of_embeddings_equal_dense_gradients(folder: Path) -> None:
    class OneHot(L.Layer):  # type: ignore[misc]
        """An embedding whose gradient is dense."""

        def build(self, shape: Any) -> None:
            self.table = self.add_weight(shape=(50, 8), initializer="uniform", name="table")

        def call(self, ids: Any) -> Any:
            return tf.one_hot(ids, 50) @ self.table

    x, y = sequences()
    for optimizer in ("sgd", "adagrad"):
        models = []
        for embedding in (L.Embedding(50, 8), OneHot()):
            keras.utils.set_random_seed(1)
            models.append(
                keras.Sequential(
                    [
                        keras.Input((12,), dtype="int32"),
                        embedding,
                        L.GlobalAveragePooling1D(),
                        L.Dense(1),
                    ]
                )
            )
            models[-1].compile(optimizer, "mse")
        ours, theirs = models
        ours.set_weights(theirs.get_weights())
        tfdist.fit(ours, x, y, **ORDERED, strategy=asynchronous(max_staleness=0))
        theirs.fit(x, y, **ORDERED)
        assert_weights_close(ours, theirs)


@check(SERVERS)
def rows_without_a_gradient_are_not_touched(folder: Path) -> None:
    model = keras.Sequential(
        [keras.Input((3,), dtype="int32"), L.Embedding(1000, 8), L.Dense(1)]
    )
    model.compile("adam", "mse")
    before = model.get_weights()[0]
    ids = np.random.default_rng(0).integers(0, 500, size=(200, 3)).astype("int32")
    y = np.ones((200, 3, 1), "float32")
    tfdist.fit(model, ids, y, batch_size=20, epochs=2, verbose=0, strategy=asynchronous())
    changed = np.flatnonzero((model.get_weights()[0] != before).any(1))
    np.testing.assert_array_equal(changed, np.unique(ids))


@check(SERVERS)
def split_tables_save_into_one_file(folder: Path) -> None:
    model = keras.Sequential(
        [keras.Input((3,), dtype="int32"), L.Embedding(1000, 8), L.Dense(1)]
    )
    model.compile("adam", "mse")
    ids = np.arange(600, dtype="int32").reshape(200, 3)
    parts = [h for h in tfdist.placement(model).homes if h.path.endswith("embeddings")]
    assert [h.server for h in parts] == [0, 1]
    checkpoint = keras.callbacks.ModelCheckpoint(folder / "{epoch}.keras")
    tfdist.fit(
        model, ids, np.ones((200, 3, 1)), epochs=2, verbose=0, callbacks=[checkpoint],
        strategy=asynchronous(),
    )  # fmt: skip
    loaded = keras.models.load_model(folder / "2.keras")
    for ours, theirs in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert int(loaded.optimizer.iterations.numpy()) == int(model.optimizer.iterations.numpy())


@check(SERVERS)
def callbacks_decide_on_exact_logs(folder: Path) -> None:
    ours = mlp(clipped_sgd())
    stopping = keras.callbacks.EarlyStopping("loss", min_delta=10.0, patience=1)
    seen: list[Any] = []
    note = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(logs))
    history = tfdist.fit(
        ours, *table(331), epochs=9, verbose=0, callbacks=[stopping, note],
        validation_data=table(50), strategy=asynchronous(),
    )  # fmt: skip
    assert len(history.history["loss"]) == 2
    assert [logs["val_loss"] for logs in seen] == history.history["val_loss"]


@check(SERVERS)
def a_step_may_be_the_last(folder: Path) -> None:
    class Stop(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.model.stop_training = batch == 3

    model = mlp(clipped_sgd())
    tfdist.fit(
        model, *table(), epochs=2, verbose=0, callbacks=[Stop()], strategy=asynchronous()
    )
    assert int(model.optimizer.iterations.numpy()) == 4


@check(SERVERS)
def every_kind_of_input(folder: Path) -> None:
    def pages() -> Any:
        x, y = table(300)
        for start in range(0, 300, 50):
            yield x[start : start + 50], y[start : start + 50]

    dataset = tf.data.Dataset.from_tensor_slices(table(300)).batch(64)
    inputs = [
        (dataset, 5),
        (dataset.filter(lambda *_: True), 5),
        (Pages(*table(300)), 6),
        (pages(), 6),
    ]
    for x, steps in inputs:
        model = mlp(clipped_sgd())
        tfdist.fit(model, x, verbose=0, strategy=asynchronous(data="workers"))
        assert int(model.optimizer.iterations.numpy()) == steps


@check(SERVERS)
def several_steps_in_one_go(folder: Path) -> None:
    model = mlp(clipped_sgd(), steps_per_execution=4)
    strategy = asynchronous(max_staleness=6)
    tfdist.fit(model, *table(), batch_size=64, epochs=2, verbose=0, strategy=strategy)
    assert int(model.optimizer.iterations.numpy()) == 32
    assert strategy.staleness.maximum <= 6


@check(SERVERS)
def own_train_steps_and_statistics(folder: Path) -> None:
    model = Adversaries()
    model.compile(optimizer=keras.optimizers.Adam(0.01))
    history = tfdist.fit(
        model, table()[0], batch_size=64, epochs=2, verbose=0, strategy=asynchronous()
    )
    assert np.isfinite(history.history["judge_loss"]).all()
    assert int(model.judge_optimizer.iterations.numpy()) == 32
    assert int(model.optimizer.iterations.numpy()) == 32

    normalized = keras.Sequential(
        [keras.Input((8, 8, 1)), L.BatchNormalization(momentum=0.5), L.Flatten(), L.Dense(4)]
    )
    normalized.compile("adam", crossentropy())
    x, y = images()
    tfdist.fit(normalized, x, y, batch_size=8, epochs=3, verbose=0, strategy=asynchronous())
    mean = float(normalized.layers[0].moving_mean.numpy()[0])
    assert abs(mean - x.mean()) < 0.2  # that of the data, from 0 at the beginning


@check(SERVERS)
def dropout_differs_from_step_to_step(folder: Path) -> None:
    inputs = keras.Input((500,))
    layer = L.Dense(1, use_bias=False, kernel_initializer="zeros")
    model = keras.Model(inputs, layer(L.Dropout(0.5)(inputs)))
    model.compile(keras.optimizers.SGD(1.0), loss=lambda y, p: tf.reduce_mean(p))
    tfdist.fit(
        model, np.ones((40, 500)), np.ones((40, 1)), batch_size=1, verbose=0,
        strategy=asynchronous(),
    )  # fmt: skip
    # Each weight was changed by -2 in the steps that kept its input: binomial(40, 1/2) steps.
    kept = -model.get_weights()[0].ravel() / 2
    np.testing.assert_allclose(kept, kept.round(), atol=1e-5)
    assert 2.4 < kept.std() < 4.0  # sqrt(10) = 3.16, and 0 if all steps dropped alike


@check(SERVERS)
def what_asynchronous_servers_cannot_do_is_refused(folder: Path) -> None:
    with pytest.raises(ArgumentError, match="every step a row"):
        tfdist.fit(
            mlp(clipped_sgd()), *table(), sampler=tfdist.privacy.Poisson(), verbose=0,
            strategy=asynchronous(),
        )  # fmt: skip
    with pytest.raises(ArgumentError, match="built"):
        tfdist.placement(keras.Sequential([L.Dense(1)]))


@check(SERVERS)
def bytes_are_balanced(folder: Path) -> None:
    model = keras.Sequential([keras.Input((64,)), *(L.Dense(64) for _ in range(9)), L.Dense(3)])
    model.compile("adam", "mse")
    placed = tfdist.placement(model, tfdist.ParameterServer(min_part_bytes=2**30))
    loads = [placed.bytes_of(server) for server in range(placed.num_servers)]
    assert max(loads) / min(loads) < 1.2
    held = sum(3 * 4 * int(np.prod(v.shape)) for v in model.trainable_variables)
    assert sum(loads) == held
    assert str(placed).splitlines()[-1] == (
        f"bytes of each server: ps 0: {loads[0]:,}, ps 1: {loads[1]:,}"
    )
