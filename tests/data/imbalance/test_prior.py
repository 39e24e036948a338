"""Corrections for the classes' shares: of a trained model's outputs, and in the loss."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

import tfdist
from tfdist.errors import ArgumentError
from tfdist.imbalance import LogitAdjustedCrossentropy, correct_prior

pytestmark = pytest.mark.quick

TRUE, TRAINED = np.array([0.7, 0.2, 0.1]), np.array([0.2, 0.3, 0.5])


def model(width: int, activation: Any = None) -> Any:
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(width, activation, bias_initializer="random_normal"),
        ]
    )


X = np.random.default_rng(0).normal(size=(50, 4)).astype("float32")


def test_probabilities_are_shifted() -> None:
    given = model(3, "softmax")
    p = given.predict(X, verbose=0).astype("float64")
    expected = p * TRUE / TRAINED
    expected /= expected.sum(1, keepdims=True)
    received = tfdist.predict(correct_prior(given, TRUE * 100, TRAINED), X, verbose=0)
    np.testing.assert_allclose(received, expected, rtol=1e-5)


def test_logits_are_shifted() -> None:
    given = model(3)
    received = correct_prior(given, TRUE, TRAINED, from_logits=True).predict(X, verbose=0)
    expected = given.predict(X, verbose=0) + np.log(TRUE / TRAINED)
    np.testing.assert_allclose(received, expected, rtol=1e-5, atol=1e-6)


def test_two_classes_by_one_output_are_as_by_two() -> None:
    given = model(1, "sigmoid")
    p = given.predict(X, verbose=0).astype("float64")
    for true in ([0.99, 0.01], [0.01, 0.99], [1e-30, 1.0]):
        expected = p * true[1] / (p * true[1] + (1 - p) * true[0])
        received = correct_prior(given, true).predict(X, verbose=0)
        np.testing.assert_allclose(received, expected, rtol=1e-5)
    received = correct_prior(model(1), [0.9, 0.1], from_logits=True).predict(X, verbose=0)
    np.testing.assert_allclose(
        received, model(1).predict(X, verbose=0) - np.log(9), rtol=1e-5, atol=1e-6
    )


def test_rare_and_sure_stays_finite() -> None:
    inputs = keras.Input((3,))
    given = keras.Model(inputs, keras.layers.Softmax()(inputs))
    corrected = correct_prior(given, [1.0, 1e-30, 1e-30])
    received = corrected.predict(np.eye(3, dtype="float32") * 30, verbose=0)
    assert np.isfinite(received).all()
    np.testing.assert_allclose(received.sum(1), 1, rtol=1e-6)


class Subclassed(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.dense = keras.layers.Dense(3, "softmax")

    def call(self, x: Any) -> Any:
        return self.dense(x)


def test_subclassed_models() -> None:
    given = Subclassed()
    p = given.predict(X, verbose=0)
    received = correct_prior(given, TRUE).predict(X, verbose=0)
    expected = p * TRUE / (p * TRUE).sum(1, keepdims=True)
    np.testing.assert_allclose(received, expected, rtol=1e-5)


def test_corrected_models_are_saved_and_share_weights(tmp_path: Any) -> None:
    given = model(3, "softmax")
    corrected = correct_prior(given, TRUE, TRAINED)
    corrected.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    expected = corrected.predict(X, verbose=0)
    np.testing.assert_allclose(loaded.predict(X, verbose=0), expected, rtol=1e-6)
    given.set_weights([w * 2 for w in given.get_weights()])
    assert not np.allclose(corrected.predict(X, verbose=0), expected)


def test_correction_recovers_the_true_shares() -> None:
    # Two normal classes at 1:50: trained on equal shares, the mean probability of the rare
    # one is more than 5 times its share; corrected, it is the share to within a tenth.
    rng = np.random.default_rng(3)
    y = (rng.random(20_000) < 0.02).astype("int32")
    x = (rng.normal(size=(20_000, 1)) + 1.5 * y[:, None]).astype("float32")
    given = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, "sigmoid")])
    given.compile(keras.optimizers.SGD(1.0), "binary_crossentropy")
    tfdist.fit(
        given, x, y, batch_size=2000, epochs=30, seed=1, verbose=0,
        sampler=tfdist.samplers.ClassBalanced(),
    )  # fmt: skip
    share = y.mean()
    assert given.predict(x, verbose=0).mean() > 5 * share
    corrected = correct_prior(given, np.bincount(y)).predict(x, verbose=0).mean()
    assert corrected == pytest.approx(share, rel=0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: correct_prior(model(3), [0.5, 0.5]), "2 and 2 numbers, and a model with 3"),
        (lambda: correct_prior(model(1), [0.5, 0.3, 0.2]), "a model with 2"),
        (lambda: correct_prior(model(3), TRUE, [0.5, 0.5]), "3 and 2 numbers"),
        (lambda: correct_prior(model(2), [1.0, 0.0]), r"true=\[1.0, 0.0\]"),
        (lambda: correct_prior(model(2), [1.0, 1.0], [1.0, -1.0]), "trained="),
        (lambda: correct_prior(model(2), [1.0, float("nan")]), "true="),
        (lambda: correct_prior(model(2), [1.0]), r"shape \(1,\)"),
        (lambda: LogitAdjustedCrossentropy([10, 0]), "counts="),
        (lambda: LogitAdjustedCrossentropy([10, 1], tau=float("inf")), "tau=inf"),
        (
            lambda: LogitAdjustedCrossentropy([1, 1, 1])(np.zeros((2, 1)), np.zeros((2, 2))),
            r"3 numbers, and logits of shape \(2, 2\)",
        ),
    ],
)
def test_what_cannot_be_used_is_said(make: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()


def test_several_outputs_are_refused() -> None:
    inputs = keras.Input((4,))
    outputs = [keras.layers.Dense(2)(inputs), keras.layers.Dense(2)(inputs)]
    with pytest.raises(ArgumentError, match="a model with 2"):
        correct_prior(keras.Model(inputs, outputs), [0.5, 0.5])


@pytest.mark.parametrize("tau", [0.0, 1.0, 1.7])
def test_loss_is_crossentropy_of_adjusted_logits(tau: float) -> None:
    logits = np.random.default_rng(1).normal(size=(20, 3)).astype("float32")
    labels = np.arange(20) % 3
    counts = np.array([70, 20, 10])
    adjusted = logits + tau * np.log(counts / 100)
    expected = -np.log(np.exp(adjusted) / np.exp(adjusted).sum(1, keepdims=True))
    expected = expected[np.arange(20), labels]
    loss = LogitAdjustedCrossentropy(counts, tau, reduction=None)
    for y in (labels, labels[:, None], labels.astype("float32"), np.eye(3)[labels]):
        np.testing.assert_allclose(loss(y, logits), expected, rtol=1e-4)
    mean = LogitAdjustedCrossentropy(counts, tau)(labels, logits)
    assert float(mean) == pytest.approx(expected.mean(), rel=1e-5)


def test_binary_loss_is_that_of_two_classes() -> None:
    logit = np.linspace(-3, 3, 8).astype("float32")
    labels = np.arange(8) % 2
    two = LogitAdjustedCrossentropy([9, 1], reduction=None)(
        labels, np.stack([np.zeros(8), logit], 1)
    )
    for y in (labels, labels[:, None]):
        one = LogitAdjustedCrossentropy([9, 1], reduction=None)(y, logit[:, None])
        np.testing.assert_allclose(one, two, rtol=1e-5)


def test_loss_is_serialized(tmp_path: Any) -> None:
    given = model(3)
    given.compile("sgd", LogitAdjustedCrossentropy([70, 20, 10], tau=0.5, reduction="sum"))
    given.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    y = np.arange(50) % 3
    assert loaded.loss.get_config() == given.loss.get_config()
    assert loaded.evaluate(X, y, verbose=0) == pytest.approx(given.evaluate(X, y, verbose=0))
