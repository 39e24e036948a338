"""Validation in private training: on what it may be, and who may decide by it."""

from __future__ import annotations

import itertools
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfdist
from tfdist.errors import ArgumentError
from tfdist.privacy import leaking_callbacks
from tfdist.privacy.shared_rows import are_rows_of, has_rows_of
from tfdist.privacy.validation import check_callbacks, check_validation

pytestmark = pytest.mark.quick
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(120, 8)).astype("float32"), RNG.normal(size=(120, 1))
OTHERS = RNG.normal(size=(40, 8)).astype("float32"), RNG.normal(size=(40, 1))


def private_fit(*callbacks: Any, **options: Any) -> Any:
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    privacy = tfdist.DPSGD(1.0, noise_multiplier=8.0, delta=1e-4)
    given = {"batch_size": 40, "verbose": 0, "privacy": privacy, "callbacks": [*callbacks]}
    return tfdist.fit(model, X, Y, **given, **options)


def stopping(**options: Any) -> Any:
    return keras.callbacks.EarlyStopping("val_loss", **options)


@pytest.mark.parametrize(
    "options",
    [
        {"validation_split": 0.1},
        {"validation_data": (X, Y)},
        {"validation_data": (X[30:50], Y[30:50])},
        {"validation_data": (X[5:90:3].copy(), Y[5:90:3])},  # shares no memory
        {"validation_data": (X[5:90].astype("float64"), Y[5:90])},
        {"validation_data": (tf.constant(X[:9]), tf.constant(Y[:9]))},
        {"validation_data": tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(99).batch(9)},
    ],
)
def test_no_callback_decides_by_private_data(options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match="must not depend on validation on protected data"):
        private_fit(stopping(), **options)


@pytest.mark.parametrize(
    "callback",
    [
        keras.callbacks.ReduceLROnPlateau("val_loss"),
        keras.callbacks.ModelCheckpoint("any.keras", "val_loss", save_best_only=True),
    ],
)
def test_which_callbacks_decide(callback: Any) -> None:
    with pytest.raises(ArgumentError, match=f"{type(callback).__name__} with monitor='val_"):
        private_fit(callback, validation_split=0.1)


class Named(keras.Model):  # type: ignore[misc]
    """Logs a training loss by the name that validation would give it."""

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        found = super().compute_metrics(x, y, y_pred, sample_weight)
        return {**found, "val_other": found["loss"]}


@pytest.mark.parametrize("name", ["val_mine", "val_loss", "epsilon", "val_other"])
def test_a_training_metric_decides_under_no_name(name: str) -> None:
    x = keras.Input((8,))
    model = Named(x, keras.layers.Dense(1)(x))
    metric = keras.metrics.MeanSquaredError("mine" if name == "val_other" else name)
    model.compile("sgd", "mse", metrics=[metric])
    privacy = tfdist.DPSGD(1.0, noise_multiplier=8.0, delta=1e-4)
    named = keras.callbacks.ModelCheckpoint(f"{{{name}}}.keras")
    if name.startswith("val_"):
        with pytest.raises(ArgumentError, match="names of weight files"):
            leaking_callbacks.check_names([named], ["loss", name])
    made = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: pytest.fail("late"))
    with pytest.raises(ArgumentError, match=f"EarlyStopping with monitor='{name}'"):
        tfdist.fit(
            model, X, Y, batch_size=40, verbose=0, privacy=privacy, validation_data=OTHERS,
            callbacks=[keras.callbacks.EarlyStopping(name), made],
        )  # fmt: skip


def test_what_only_looks_may_and_is_said() -> None:
    schedule = keras.callbacks.LearningRateScheduler(lambda epoch: 0.1)
    inside = private_fit(schedule, validation_split=0.1)
    assert "val_loss" in inside.history
    assert "rows held out from them" in inside.privacy.statement()
    outside = private_fit(stopping(patience=3), validation_data=OTHERS)
    assert "rows held out from them" not in outside.privacy.statement()
    assert "Choices by validation" in outside.privacy.statement()


def test_rows_of_a_generator_may_be_any() -> None:
    x = np.ones((64, 3), "float32")
    stream = (batch for batch in [(np.zeros((8, 3)), np.zeros(8))])
    stop = keras.callbacks.EarlyStopping()
    with pytest.raises(ArgumentError, match="of type generator, which may have rows of `x`"):
        check_validation([stop], x, stream, 0.0)
    assert check_validation([], x, stream, 0.0)
    assert len(list(stream)) == 1  # it was not read


def test_rows_that_are_equal_by_chance_do_not_count() -> None:
    bits = RNG.integers(0, 2, (500, 3))
    assert not are_rows_of(RNG.integers(0, 2, (50, 3)), bits)
    assert not are_rows_of(OTHERS[0], X)
    assert not are_rows_of(np.concatenate([OTHERS[0], X[:2]]), X)
    few = RNG.integers(0, 3, (300, 6))  # a third of the rows come twice
    assert not are_rows_of(RNG.integers(0, 3, (100, 6)), few)
    assert are_rows_of(few[:90].copy(), few)
    assert are_rows_of({"a": X[3:40].copy(), "b": bits[3:40]}, {"a": X, "b": bits[:120]})
    assert not are_rows_of({"a": OTHERS[0], "b": bits[:40]}, {"a": X, "b": bits[:120]})
    words = np.array(["one", "two", "three", "four"])
    assert are_rows_of(words[1:3].copy(), words)
    assert not are_rows_of(X[:0], X)
    assert not are_rows_of(X[:, :3].copy(), X)
    assert not are_rows_of(tf.data.Dataset.from_tensors(X), X)


def test_rows_are_found_in_each_form_that_keras_takes() -> None:
    words = np.array([f"wörter {number}" for number in range(90)])
    forms = [words, words.astype(object), np.char.encode(words, "utf-8"), tf.constant(words)]
    for some, x in itertools.product(forms, forms):
        assert are_rows_of(some[20:40], x)
    assert not are_rows_of(np.array(["other"] * 20, object), words)
    assert are_rows_of({"a": X[20:40].copy()}, {"a": X, "number": np.arange(len(X))})
    images = RNG.random((60, 5, 5, 1))
    assert are_rows_of(images[20:40, :, :, 0].copy(), images)
    stream = tf.data.Dataset.from_tensor_slices((X, Y)).batch(8)
    assert has_rows_of(X[60:80].copy(), stream)
    assert has_rows_of(stream.skip(6), stream)
    assert not has_rows_of(OTHERS[0], stream)


def test_rows_are_found_rounded_repeated_and_among_others() -> None:
    exact = RNG.normal(size=(120, 8))
    assert are_rows_of(exact[:40].astype("float32"), exact)
    assert are_rows_of(exact[:40].astype("float32").astype("float64"), exact)
    assert are_rows_of(X[:40].astype("float16"), X)
    assert are_rows_of(X[:40].copy(), np.concatenate([X, X, X[:60]]))
    assert are_rows_of(np.concatenate([OTHERS[0], X[:4]]), X)
    assert are_rows_of(-np.eye(9), np.eye(9) * -1.0 + 0.0)  # -0 and 0 are one number
    pixels = RNG.integers(0, 256, (80, 9), "uint8")
    assert are_rows_of(pixels[:20].astype("float32"), np.concatenate([pixels, pixels]))
    assert not are_rows_of(pixels[:20] / 255.0, pixels)


@pytest.mark.parametrize("x", [X, tf.data.Dataset.from_tensor_slices((X, Y)).batch(60)])
def test_metrics_of_classes_are_not_of_private_rows(x: Any) -> None:
    labels = np.arange(40) % 2
    with pytest.raises(ArgumentError, match="PerClassMetrics must not use the training data"):
        check_callbacks([tfdist.PerClassMetrics(X[:40].copy(), labels)], x)
    check_callbacks([tfdist.PerClassMetrics(OTHERS[0], labels)], x)


@pytest.mark.parametrize("rows", [[], [[1, 2], [3]]])
def test_a_stream_without_dense_rows_is_looked_at_in_vain(rows: Any) -> None:
    stream = tf.data.Dataset.from_tensor_slices(tf.ragged.constant(rows, ragged_rank=1))
    assert not check_validation([stopping()], X, stream.batch(2), 0.0)
