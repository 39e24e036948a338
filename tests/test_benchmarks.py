"""The sums of the benchmark of the cost model."""

from __future__ import annotations

import pytest

from benchmarks.recommend_cases import Case, table_of, totals

pytestmark = pytest.mark.quick
CASES = [
    Case(
        "close",
        {"single": 1.0, "multi_worker": 1.05},
        {"usual": {"single": 2.0, "multi_worker": 0.84}},
        {"usual": "multi_worker"},
    ),
    Case(
        "wrong",
        {"single": 2.0, "multi_worker": 1.0},
        {"usual": {"single": 2.0, "multi_worker": 1.5}},
        {"usual": "single"},
    ),
    Case("other", {"single": 1.0}, {"usual": {"single": 1.1}}, {"usual": "not measured"}),
]


def test_errors_and_choices_are_counted():
    found = totals(CASES, "usual")
    # Without signs: 1, 0.2, 0, 0.5, 0.1
    assert found.median_error == pytest.approx(0.2)
    assert found.largest_error == pytest.approx(1)
    assert (found.cells, found.cases) == (5, 3)
    assert found.right == 1  # 5 % slower than the fastest; not twice as slow; not measured
    assert found.single_is_fastest == 2


def test_a_row_has_predictions_measurements_and_signed_errors():
    rows = table_of(CASES, ("single", "multi_worker"), "usual")
    close = ["close", "2000 / 1000 (+100 %)", "840 / 1050 (-20 %)"]
    assert rows[0] == [*close, "multi_worker", "yes"]
    assert rows[1][-2:] == ["single", "no: multi_worker"]
    assert rows[2][2] == ""
