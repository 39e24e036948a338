"""Class weights: found by counting, alike for every kind of input, refused when wrong."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn.utils.class_weight import compute_class_weight

import tfdist
from tfdist import data
from tfdist.data.class_weight import weigher
from tfdist.errors import ArgumentError
from tfdist.imbalance import EffectiveNumber, class_weights
from tfdist.samplers import Uniform

pytestmark = pytest.mark.quick

LABELS = np.random.default_rng(0).permutation(np.repeat([0, 1, 4], [70, 25, 5]))
X = np.random.default_rng(1).normal(size=(100, 3)).astype("float32")


class Pages(keras.utils.PyDataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, page: int) -> tuple[Any, Any]:
        rows = slice(page * 25, page * 25 + 25)
        return X[rows], LABELS[rows]


class EndlessPages(Pages):
    @property
    def num_batches(self) -> None:
        return None


def dataset() -> Any:
    return tf.data.Dataset.from_tensor_slices((X, LABELS)).batch(30)


def read(x: Any, y: Any, class_weight: Any, steps: int | None = None) -> data.Source:
    settings = data.SourceSettings(
        None, steps, Uniform(), shuffle=True, seed=0, training=True, class_weight=class_weight
    )
    return data.read(x, y, None, settings)


def test_rules() -> None:
    balanced = compute_class_weight("balanced", classes=np.unique(LABELS), y=LABELS)
    assert class_weights(LABELS) == dict(zip([0, 1, 4], balanced, strict=True))
    # By Cui et al.: (1 - beta) / (1 - beta^n), scaled to add up to the number of classes.
    for beta, rule in ((0.999, "effective"), (0.9, EffectiveNumber(0.9))):
        plain = np.array([(1 - beta) / (1 - beta**n) for n in (70, 25, 5)])
        found = class_weights(LABELS, rule)
        np.testing.assert_allclose(list(found.values()), plain * 3 / plain.sum(), rtol=1e-6)
    assert set(class_weights(LABELS, EffectiveNumber(0.0)).values()) == {1.0}
    near_one = class_weights(LABELS, EffectiveNumber(1 - 1e-12))
    assert near_one[4] / near_one[0] == pytest.approx(14, rel=1e-3)
    assert class_weights(np.array([0, 0, 0, 1]))[1] == 2.0  # a class with one example
    assert class_weights(np.eye(5)[LABELS]) == class_weights(LABELS[:, None].astype("float32"))


@pytest.mark.parametrize("rule", ["balanced", "effective", EffectiveNumber(0.99)])
@pytest.mark.parametrize("kind", ["arrays", "one-hot", "dataset", "unknown length", "pages"])
def test_every_kind_of_input_gets_the_weights(kind: str, rule: Any) -> None:
    x, y = {
        "arrays": (X, LABELS),
        "one-hot": (X, np.eye(5, dtype="float32")[LABELS]),
        "dataset": (dataset(), None),
        "unknown length": (dataset().filter(lambda *_: True), None),
        "pages": (Pages(), None),
    }[kind]
    source = read(x, y, rule)
    wanted = class_weights(LABELS, rule)
    shares = source.shares(tfdist.init().strategy.place).take(4)
    for _, y, weights in (share.data for share in shares):
        labels = y.numpy().argmax(-1) if kind == "one-hot" else y.numpy()
        np.testing.assert_allclose(weights, [wanted[c] for c in labels], rtol=1e-6)


def test_fit_takes_rules() -> None:
    models = []
    for class_weight in ("balanced", class_weights(LABELS)):
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(5, "softmax")])
        model.compile("sgd", "sparse_categorical_crossentropy")
        tfdist.fit(model, X, LABELS, seed=1, class_weight=class_weight, verbose=0)
        models.append(model.get_weights())
    for ours, theirs in zip(*models, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("x", "y", "class_weight", "message"),
    [
        (X, LABELS, {0: 1.0, 2: 1.0, 9: 3.0}, r"classes \[2, 9\]"),
        (X, LABELS, {0: 1.0, 1: -0.5}, "1: -0.5"),
        (X, LABELS, {0: float("nan")}, "0: nan"),
        (X, LABELS, {0: float("inf")}, "0: inf"),
        (X, LABELS, {-1: 1.0}, "-1: 1.0"),
        (X, LABELS, {"a": 1.0}, "'a': 1.0"),
        (X, LABELS, "equal", "'equal'"),
        (X, LABELS[:99], "balanced", "99"),
        (X, LABELS - 1, "balanced", "from 0 on"),
        (X, LABELS + 0.5, "balanced", "class numbers"),
        (X, np.ones((100, 2)), "balanced", "one-hot"),
        (X, {"a": LABELS, "b": LABELS}, "balanced", "one target"),
        (X, None, "balanced", "y=None"),
        (dataset().repeat(), None, "balanced", "without a known end"),
        (EndlessPages(), None, "effective", "without a length"),
        (iter(()), None, "balanced", "must be arrays"),
        ((part for part in [(X, LABELS)]), None, "balanced", "generator"),
    ],
)
def test_what_cannot_be_used_is_said(x: Any, y: Any, class_weight: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        read(x, y, class_weight)


def test_an_endless_dataset_of_unknown_length_is_not_counted() -> None:
    endless = dataset().repeat().filter(lambda *_: True)
    with pytest.raises(ArgumentError, match="without a known end"):
        read(endless, None, "balanced", steps=3)
    assert read(endless, None, {0: 2.0}, steps=3).steps == 3


@pytest.mark.parametrize("beta", [1.0, -0.1, float("nan")])
def test_beta_has_a_range(beta: float) -> None:
    with pytest.raises(ArgumentError, match="beta"):
        EffectiveNumber(beta)


def test_class_weights_as_in_keras() -> None:
    weigh = weigher({0: 2.0, 2: 0.5}, list, must_occur=False)
    for y in (np.array([0, 1, 2, 5]), np.array([[0.0], [1.0], [2.0], [5.0]])):
        np.testing.assert_allclose(weigh(np.ones((4, 1)), tf.constant(y))[2], [2, 1, 0.5, 1])
    one_hot = tf.one_hot([0, 1, 2, 1], 3)
    np.testing.assert_allclose(weigh(np.ones((4, 1)), one_hot)[2], [2, 1, 0.5, 1])
