"""Samplers by class and weight: exact shares, nothing twice too early, no bias."""

from __future__ import annotations

import time
import tracemalloc
from collections import Counter
from typing import Any

import numpy as np
import pytest

from tfdist.errors import ArgumentError
from tfdist.samplers import (
    ClassBalanced,
    Oversample,
    Sampler,
    Stratified,
    Undersample,
    Uniform,
    Weighted,
)
from tfdist.samplers.balanced import apportion
from tfdist.samplers.classes import count_classes, group_rows
from tfdist.samplers.labelled import Passes

pytestmark = pytest.mark.quick

LONG_TAIL = np.random.default_rng(0).permutation(np.repeat([3, 5, 8, 9], [700, 200, 60, 1]))
LARGE = np.random.default_rng(1).permutation(np.repeat([0, 1, 2], [150_000, 70_000, 37]))


def epochs(sampler: Sampler, rows: int, batch: int, count: int = 1, seed: int = 5) -> Any:
    """Draws whole epochs: an array for each, of the rows in order."""
    steps = sampler.steps_per_epoch(rows, batch)
    drawn = sampler.batches(0, steps * count, num_rows=rows, batch_size=batch, seed=seed)
    assert all(1 <= len(part) <= batch for part in drawn)
    assert all(len(part) == batch for i, part in enumerate(drawn) if (i + 1) % steps)
    return [np.concatenate(drawn[e * steps : (e + 1) * steps]) for e in range(count)]


def shares(labels: Any, rows: Any) -> list[int]:
    return [int((labels[rows] == name).sum()) for name in np.unique(labels)]


def make(kind: Any, labels: Any) -> Sampler:
    return kind(1.0 + labels % 3) if kind is Weighted else kind(labels=labels)


KINDS = [ClassBalanced, Undersample, Oversample, Stratified, Weighted]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("labels", "batch"), [(LONG_TAIL, 64), (LARGE, 1000)])
def test_a_step_depends_on_seed_and_step_alone(kind: Any, labels: Any, batch: int) -> None:
    settings: dict[str, Any] = {"num_rows": len(labels), "batch_size": batch, "seed": 9}
    sampler = make(kind, labels)
    steps = sampler.steps_per_epoch(len(labels), batch)
    for first in (0, steps - 1, 2 * steps + 1):
        together = make(kind, labels).batches(first, 9, **settings)
        for step, received in reversed(list(enumerate(together, first))):
            np.testing.assert_array_equal(received, sampler.rows(step, **settings))
    assert not np.array_equal(
        sampler.rows(0, **settings), sampler.rows(0, **{**settings, "seed": 8})
    )
    assert not np.array_equal(sampler.rows(0, **settings), sampler.rows(steps, **settings))


@pytest.mark.parametrize("labels", [LONG_TAIL, LARGE])
def test_shares_of_an_epoch_are_exact(labels: Any) -> None:
    n, counts = len(labels), np.unique(labels, return_counts=True)[1]
    equal = len(counts)
    for rows in epochs(ClassBalanced(labels=labels), n, 64, 2):
        assert len(rows) == n
        assert max(shares(labels, rows)) - min(shares(labels, rows)) <= 1
    for rows in epochs(ClassBalanced(0.5, labels), n, 64, 2):
        wanted = n * np.sqrt(counts) / np.sqrt(counts).sum()
        assert np.abs(shares(labels, rows) - wanted).max() <= 1
    for rows in epochs(ClassBalanced(0.0, labels), n, 64, 2):
        assert sorted(rows) == list(range(n))
    for rows in epochs(Undersample(labels), n, 64, 2):
        assert shares(labels, rows) == [counts.min()] * equal
        assert len(set(rows)) == len(rows)
    for rows in epochs(Oversample(labels), n, 64, 1):
        assert shares(labels, rows) == [counts.max()] * equal
        assert set(rows) == set(range(n))


@pytest.mark.parametrize(
    "sampler",
    [
        ClassBalanced(labels=LONG_TAIL),
        ClassBalanced(0.3, LONG_TAIL),
        Undersample(LONG_TAIL),
        Oversample(LONG_TAIL),
        Stratified(LONG_TAIL),
        ClassBalanced(labels=LARGE),
    ],
)
def test_no_row_comes_again_before_all_of_its_class_have(sampler: Any) -> None:
    labels = sampler.labels
    drawn = np.concatenate(epochs(sampler, len(labels), 50, 3 if len(labels) < 1000 else 2))
    for name, count in zip(*np.unique(labels, return_counts=True), strict=True):
        rows = drawn[labels[drawn] == name]
        whole = len(rows) // count * count
        passes = np.sort(rows[:whole].reshape(-1, count), axis=1)
        assert (passes == np.flatnonzero(labels == name)).all()
        assert len(set(rows[whole:])) == len(rows) - whole
        if 100 < count < whole / 2:  # another order in each pass
            orders = rows[:whole].reshape(-1, count)
            assert (orders[0] == orders[1]).sum() < 12  # 1 is expected


@pytest.mark.parametrize("labels", [LONG_TAIL, np.arange(1003) % 90, np.arange(40) % 2])
@pytest.mark.parametrize("batch", [1, 7, 64, 961, 5000])
def test_each_batch_keeps_the_shares_as_nearly_as_whole_numbers_allow(
    labels: Any, batch: int
) -> None:
    sampler = Stratified(labels)
    n, counts = len(labels), np.unique(labels, return_counts=True)[1]
    for rows in epochs(sampler, n, batch, 3):
        assert sorted(rows) == list(range(n))
        for part in np.split(rows, range(batch, n, batch)):
            exact = len(part) * counts / n
            found = np.array(shares(labels, part))
            assert (np.floor(exact - 1e-9) <= found).all()
            assert (found <= np.ceil(exact + 1e-9)).all()


def test_stratified_keeps_combinations_of_labels() -> None:
    labels = np.random.default_rng(3).random((400, 3)) < [0.5, 0.2, 0.1]
    combined = labels @ [1, 2, 4]
    found = [shares(combined, part) for part in Stratified(labels).batches(
        0, 4, num_rows=400, batch_size=100, seed=1
    )]  # fmt: skip
    wanted = np.unique(combined, return_counts=True)[1] / 4
    assert (np.abs(found - wanted) < 1).all()


def test_several_labels_are_drawn_class_by_class() -> None:
    labels = np.zeros((1000, 3), int)
    labels[:900, 0] = 1
    labels[880:920, 1] = 1  # 20 rows have both; 80 rows have none, no row has the third
    classes = group_rows(labels)
    assert classes.names == [0, 1, None]
    assert classes.counts.tolist() == [900, 40, 80]
    (rows,) = epochs(ClassBalanced(labels=labels), 1000, 100)
    assert 333 <= (labels[rows].sum(1) == 0).sum() <= 334
    counts = Counter(rows.tolist())
    assert {counts[row] for row in range(920, 1000)} == {4, 5}  # 333 draws of 80 rows
    assert {counts[row] for row in range(900, 920)} <= {8, 9}  # 333 draws of 40 rows


def test_an_order_s_places_are_unbiased() -> None:
    # A class that is drawn 1/3 of the time is 1/3 of what comes at any place, to within 4
    # standard errors: of 400 seeds' first 30 draws. A bias of 0.02 would be found with
    # probability 0.99: it is 6.6 standard errors of sqrt(2/9 / 12000) = 0.0043, less 4.
    labels = np.repeat([0, 1, 2], [20, 60, 600])
    first, last = [], []
    for seed in range(400):
        (rows,) = epochs(ClassBalanced(labels=labels), 680, 30, seed=seed)
        first.append(labels[rows[:30]])
        last.append(labels[rows[-30:]])
    # Draws of one epoch are without replacement, so the standard error is smaller still.
    for place in (first, last):
        share = np.bincount(np.concatenate(place)) / 12000
        np.testing.assert_allclose(share, 1 / 3, atol=4 * 0.0043)


def test_rows_of_a_class_come_equally_often() -> None:
    # Which 60 of 600 rows the first epoch holds, over 300 seeds: chi-squared with 599 degrees
    # of freedom (less: without replacement); some rows twice as likely as others on one half
    # would give 300*60/9 = 2000 more, 58 standard deviations.
    labels = np.repeat([0, 1], [60, 600])
    counts = np.zeros(600)
    for seed in range(300):
        (rows,) = epochs(Undersample(labels), 660, 40, seed=seed)
        counts[rows[rows >= 60] - 60] += 1
    statistic = ((counts - 30) ** 2 / 30).sum()
    assert abs(statistic - 599 * 0.9) < 5 * np.sqrt(2 * 599)


def test_weights_are_expectations() -> None:
    weights = np.random.default_rng(2).uniform(0, 3, 200)
    weights[:5] = 0
    exact = 200 * weights / weights.sum()
    sampler = Weighted(weights)
    counts = np.array(
        [np.bincount(rows, minlength=200) for rows in epochs(sampler, 200, 30, 1000)]
    )
    assert ((np.floor(exact) <= counts) & (counts <= np.ceil(exact))).all()
    assert (counts.sum(1) == 200).all()
    # A count's standard deviation is at most 1/2: of the mean of 1000, 0.016. A row drawn too
    # often by 0.1 an epoch would be found with probability above 0.98.
    assert np.abs(counts.mean(0) - exact).max() < 4 * 0.016
    for rows in epochs(Weighted(np.full(1000, 0.3)), 1000, 64, 2):
        assert sorted(rows) == list(range(1000))


def test_a_class_with_one_row_is_drawn_like_any_other() -> None:
    labels = np.array([0] * 99 + [1])
    (rows,) = epochs(ClassBalanced(labels=labels), 100, 10)
    assert (rows == 99).sum() == 50
    (rows,) = epochs(Undersample(labels), 100, 10)
    assert len(rows) == 2
    (rows,) = epochs(Stratified(labels), 100, 10)
    assert (rows == 99).sum() == 1


def test_labels_of_every_kind_make_the_same_classes() -> None:
    numbers = np.array([2, 0, 2, 5, 0, 2])
    kinds = [
        numbers,
        numbers.tolist(),
        numbers[:, None].astype("float32"),
        numbers - 4,
        numbers * 100_000,
        np.array(list("cacdac")),
        np.array(list("cacdac"), object),
        np.eye(6)[numbers],
    ]
    for labels in kinds:
        classes = group_rows(labels)
        assert classes.counts.tolist() == [2, 3, 1]
        assert classes.members.tolist() == [1, 4, 0, 2, 5, 3]
        names, counts = count_classes(labels)
        assert (names, counts.tolist()) == (classes.names, [2, 3, 1])
    assert group_rows(kinds[5]).names == ["a", "c", "d"]
    assert group_rows(kinds[3]).names == [-4, -2, 1]
    assert group_rows(numbers == 2).names == [0, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClassBalanced(1.5), "alpha=1.5"),
        (lambda: ClassBalanced(float("nan")), "alpha=nan"),
        (lambda: Weighted([1.0, -2.0]), r"weights\[1\]=-2.0"),
        (lambda: Weighted([np.nan, 1.0]), r"weights\[0\]=nan"),
        (lambda: Weighted([np.inf, 1.0]), "inf"),
        (lambda: Weighted([0.0, 0.0]), "only zeros"),
        (lambda: Weighted(np.ones((2, 2))), r"shape \(2, 2\)"),
        (lambda: Oversample([]).steps_per_epoch(1, 1), r"shape \(0,\)"),
        (lambda: Oversample().steps_per_epoch(1, 1), "labels=None"),
        (lambda: Oversample([None, "a"]).steps_per_epoch(2, 1), "mixed"),
    ],
)
def test_what_cannot_be_used_is_said(make: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()


def test_data_of_another_length_is_refused() -> None:
    with pytest.raises(ArgumentError, match="3 labels or weights, and data with 4 rows"):
        Oversample([0, 1, 0]).rows(0, num_rows=4, batch_size=2, seed=0)


@pytest.mark.parametrize(
    ("seats", "given", "wanted"),
    [
        (10, [1, 1, 1], [4, 3, 3]),
        (10, [0.3, 0.3, 0.4], [3, 3, 4]),
        (5, [1e-9, 1e-9, 1.0], [1, 1, 3]),
        (7, [6, 1], [6, 1]),
        (3, [1e9, 1, 1], [1, 1, 1]),
    ],
)
def test_apportion(seats: int, given: list[float], wanted: list[int]) -> None:
    assert apportion(seats, np.array(given, float)).tolist() == wanted


def test_ten_million_labels_take_a_moment_and_little_memory() -> None:
    labels = np.random.default_rng(0).integers(0, 10, 10_000_000)
    tracemalloc.start()
    start = time.perf_counter()
    sampler = ClassBalanced().bind(labels, len(labels))
    seconds = time.perf_counter() - start
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 45e6  # bytes: an int32 for each
    assert peak < 200e6
    assert seconds < 20  # 0.4 on a quiet machine

    def cost(sampler: Sampler, attempt: int) -> float:
        settings: dict[str, Any] = {"num_rows": len(labels), "batch_size": 256, "seed": 1}
        start = time.thread_time()
        sampler.batches(500 * attempt, 500, **settings)
        return time.thread_time() - start

    # Processor time of the best of turns: other work on the machine counts little.
    turns = [(cost(sampler, turn), cost(Uniform(), turn)) for turn in range(8)]
    ours, uniform = (min(costs) for costs in zip(*turns, strict=True))
    assert ours < 20 * uniform  # 3 is usual


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_stretch_of_a_class_is_its_rows_one_after_the_other(number: int) -> None:
    classes = group_rows(LARGE)
    passes = Passes(classes, np.array([500, 500, 500]))
    size = int(classes.counts[number])
    # Within a piece that is held, across its edge, a large stretch, and across passes.
    for first, count in ((0, 5), (16_380, 10), (5, 40_000), (2 * size - 3, 6), (size - 1, 2)):
        expected = passes.rows(3, number, np.arange(first, first + count))
        np.testing.assert_array_equal(passes.stretch(3, number, first, count), expected)
