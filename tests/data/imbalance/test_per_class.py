"""Per-class metrics: what they count and refuse; tests/behaviour has them on strategies."""

from __future__ import annotations

import sys
from typing import Any

import keras
import numpy as np
import pytest
from sklearn import metrics as skl

import tfdist
from tfdist.data.imbalance.per_class import per_class
from tfdist.errors import ArgumentError, MissingPackageError

pytestmark = pytest.mark.quick

X = np.random.default_rng(0).normal(size=(90, 4)).astype("float32")
Y = (np.arange(90) % 9 == 0).astype("int64")


def model(width: int, activation: Any, loss: str) -> Any:
    keras.utils.set_random_seed(3)
    made = keras.Sequential([keras.Input((4,)), keras.layers.Dense(width, activation)])
    made.compile("sgd", loss)
    return made


def test_figures_are_scikit_learn_s() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        y, predicted = rng.integers(0, 3, 30), rng.integers(0, 4, 30)  # class 3 never occurs
        labels = range(5)  # and class 4 neither occurs nor is predicted
        found = per_class(skl.confusion_matrix(y, predicted, labels=labels))
        expected = skl.precision_recall_fscore_support(
            y, predicted, labels=labels, zero_division=0
        )
        for name, values in zip(found, expected, strict=True):
            np.testing.assert_allclose(found[name], values, rtol=1e-12)


@pytest.mark.parametrize("fit", [tfdist.fit, lambda made, *args, **o: made.fit(*args, **o)])
@pytest.mark.parametrize("threshold", [0.3, 0.5])
def test_one_output_means_two_classes(fit: Any, threshold: float) -> None:
    made = model(1, "sigmoid", "binary_crossentropy")
    seen = tfdist.PerClassMetrics(
        X, Y[:, None].astype("float32"), threshold=threshold, class_names=["no", "yes"],
        prefix="test_",
    )  # fmt: skip
    history = fit(made, X, Y, callbacks=[seen], verbose=0).history
    predicted = made.predict(X, verbose=0)[:, 0] > threshold
    np.testing.assert_array_equal(seen.confusion, skl.confusion_matrix(Y, predicted))
    assert history["test_recall_yes"] == [skl.recall_score(Y, predicted)]
    assert history["test_support_no"] == [80]


def test_balanced_accuracy_is_of_classes_that_occur() -> None:
    made = model(4, "softmax", "sparse_categorical_crossentropy")
    seen = tfdist.PerClassMetrics(X, np.eye(4)[Y])
    history = tfdist.fit(made, X, Y, callbacks=[seen], verbose=0).history
    predicted = made.predict(X, verbose=0).argmax(1)
    expected = skl.recall_score(Y, predicted, labels=[0, 1], average="macro")
    assert history["val_balanced_accuracy"] == [pytest.approx(expected)]
    assert history["val_support_3"] == [0]
    assert history["val_recall_3"] == [0.0]


@pytest.mark.parametrize("classes", [3, 30])
def test_picture_has_the_counts(classes: int, tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")
    made = model(classes, "softmax", "sparse_categorical_crossentropy")
    y = np.arange(90) % classes
    path = tmp_path / "new" / "confusion.svg"
    seen = tfdist.PerClassMetrics(X, y, picture=path)
    tfdist.fit(made, X, y, callbacks=[seen], verbose=0)
    assert path.stat().st_size > 1000
    (axes,) = seen.figure().axes
    written = [int(text.get_text()) for text in axes.texts]
    assert written == (seen.confusion.ravel().tolist() if classes == 3 else [])
    support = seen.confusion.sum(1, keepdims=True)
    np.testing.assert_allclose(axes.images[0].get_array(), seen.confusion / support)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tfdist.PerClassMetrics(X, Y - 1), "from 0 on"),
        (lambda: tfdist.PerClassMetrics(X, Y + 0.5), "float64"),
        (lambda: tfdist.PerClassMetrics(X, np.ones((90, 2))), "one-hot"),
        (lambda: tfdist.PerClassMetrics(X, np.ones((90, 2, 2))), r"shape \(90, 2, 2\)"),
        (lambda: tfdist.PerClassMetrics(X, np.array(["a"] * 90)), "class numbers"),
        (lambda: tfdist.PerClassMetrics(iter([X]), Y), "must be arrays"),
        (lambda: tfdist.PerClassMetrics(X, Y).figure(), "before its first epoch"),
    ],
)
def test_what_cannot_be_used_is_said(make: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()


@pytest.mark.parametrize(
    ("y", "names"), [(Y[1:], None), (Y + 1, None), (Y, ["a"]), (Y[:0], None)]
)
def test_what_does_not_match_the_outputs_is_said(y: Any, names: Any) -> None:
    seen = tfdist.PerClassMetrics(X, y, class_names=names)
    with pytest.raises(ArgumentError, match=r"outputs of shape \(90, 2\)"):
        tfdist.fit(
            model(2, "softmax", "sparse_categorical_crossentropy"), X, Y,
            callbacks=[seen], verbose=0,
        )  # fmt: skip


def test_missing_matplotlib_is_found_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingPackageError, match="plot"):
        tfdist.PerClassMetrics(X, Y, picture="confusion.png")
    tfdist.PerClassMetrics(X, Y)
