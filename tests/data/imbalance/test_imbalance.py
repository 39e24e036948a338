"""Reports on classes, and splits that keep their shares."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

from tfdist.errors import ArgumentError, MissingPackageError
from tfdist.imbalance import report, stratified_split

pytestmark = pytest.mark.quick

LABELS = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 7], [700, 250, 49, 1]))


def test_report_counts() -> None:
    found = report(LABELS)
    assert found.classes == (0, 1, 2, 7)
    assert found.counts == (700, 250, 49, 1)
    assert found.shares == (0.7, 0.25, 0.049, 0.001)
    assert found.ratio == 700
    wanted = [(1 - 0.999**n) / 0.001 for n in found.counts]
    np.testing.assert_allclose(found.effective, wanted, rtol=1e-6)
    assert found.figure is None
    lines = str(found).splitlines()
    assert lines[0].strip() == "1,000 rows, 4 classes, ratio 700.0"
    assert [cell.strip() for cell in lines[4].strip("│").split("│")] == [
        "0",
        "700",
        "70.000%",
        "503.6",
    ]


def test_report_of_several_labels_and_of_text() -> None:
    labels = np.zeros((10, 3))
    labels[:6, 0] = labels[4:8, 1] = 1
    found = report(labels)
    assert (found.classes, found.counts, found.rows) == ((0, 1, None), (6, 4, 2), 10)
    assert "no label" in str(found)
    assert report(np.array(["b", "a", "b"])).classes == ("a", "b")
    with pytest.raises(ArgumentError, match="fractions"):
        report(np.array([0.5, 1.0]))


@pytest.mark.parametrize("classes", [4, 200])
def test_report_draws_a_bar_for_each_class(classes: int, tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")
    counts = np.arange(1, classes + 1)
    figure = report(np.repeat(np.arange(classes), counts), plot=True).figure
    (axes,) = figure.axes
    assert [bar.get_height() for bar in axes.patches] == counts.tolist()
    assert axes.get_yscale() == "log"
    figure.savefig(tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 1000


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "sklearn.model_selection", None)
    with pytest.raises(MissingPackageError, match=r"tfdist\[plot\]"):
        report(LABELS, plot=True)
    with pytest.raises(MissingPackageError, match="pip install scikit-learn"):
        stratified_split(LABELS, LABELS)
    assert report(LABELS).ratio == 700


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.8])
def test_split_keeps_shares_nesting_and_order(fraction: float) -> None:
    rows = np.arange(1000)
    x = {"a": rows, "b": [tf.constant(rows), pd.DataFrame({"r": rows})]}
    first, second = stratified_split(x, LABELS, rows / 2, fraction=fraction, seed=3)
    for (part, y, weights), size in ((first, 1 - fraction), (second, fraction)):
        taken = part["a"]
        assert (np.diff(taken) > 0).all()
        for other in (part["b"][0].numpy(), part["b"][1]["r"], weights * 2):
            np.testing.assert_array_equal(other, taken)
        np.testing.assert_array_equal(y, LABELS[taken])
        counts = np.bincount(y, minlength=8)[:3]
        assert (np.abs(counts - np.array([700, 250, 49]) * size) <= 1.5).all()
    assert sorted([*first[0]["a"], *second[0]["a"]]) == rows.tolist()
    assert 7 in first[1]  # the class with one row
    again, _ = stratified_split(rows, LABELS, fraction=fraction, seed=3)
    np.testing.assert_array_equal(again[0], first[0]["a"])
    other, _ = stratified_split(rows, LABELS, fraction=fraction, seed=4)
    assert not np.array_equal(other[0], again[0])


@pytest.mark.parametrize("fraction", [0.2, 0.3])
def test_split_keeps_groups_together(fraction: float) -> None:
    rng = np.random.default_rng(1)
    groups = rng.integers(0, 100, 2000)
    labels = (rng.random(2000) < 0.1 + 0.2 * (groups % 3 == 0)).astype(int)
    (x, y), (x_test, y_test) = stratified_split(
        groups, labels, fraction=fraction, groups=groups, seed=1
    )
    assert not set(x) & set(x_test)
    assert len(x) + len(x_test) == 2000
    assert abs(len(x_test) / 2000 - fraction) < 0.05
    assert abs(y_test.mean() - labels.mean()) < 0.02
    assert abs(y.mean() - labels.mean()) < 0.02


def test_split_by_several_labels() -> None:
    labels = np.random.default_rng(2).random((400, 2)) < [0.5, 0.3]
    (_, y), (_, y_test) = stratified_split(np.arange(400), labels, fraction=0.25)
    both = labels @ [1, 2]
    np.testing.assert_allclose(np.bincount(y_test @ [1, 2]), np.bincount(both) / 4, atol=1)
    assert len(y) == 300


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 1.0}, "fraction=1.0"),
        ({"y": LABELS[1:]}, "same number of rows"),
        ({"groups": np.arange(999)}, "same number of rows"),
        ({"y": {"a": LABELS, "b": LABELS}}, "one array"),
        ({"groups": np.arange(1000) % 3}, "3 groups"),
        ({"fraction": 0.001}, "row of each class"),
        ({"labels": np.arange(1000) // 2}, "row of each class"),
    ],
)
def test_split_refuses(options: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        stratified_split(**{"x": np.arange(1000), "y": LABELS, **options})
