"""Samplers are functions of the seed and the step, and draw every row once an epoch."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from tfdist import samplers

pytestmark = pytest.mark.quick


def epoch(
    sampler: samplers.Sampler, number: int, rows: int, batch: int, seed: int
) -> list[int]:
    steps = sampler.steps_per_epoch(rows, batch)
    settings = {"num_rows": rows, "batch_size": batch, "seed": seed}
    drawn = sampler.batches(number * steps, steps, **settings)
    assert all(1 <= len(part) <= batch for part in drawn)
    return [int(row) for row in np.concatenate(drawn)]


@pytest.mark.parametrize("rows", [1, 2, 3, 64, 65, 1000])
@pytest.mark.parametrize("shuffle", [True, False, "batch"])
def test_every_row_once_an_epoch(rows: int, shuffle: bool | str) -> None:
    sampler = samplers.from_shuffle(shuffle)
    for number in (0, 3):
        assert sorted(epoch(sampler, number, rows, 32, 5)) == list(range(rows))


def test_orders_differ_by_epoch_and_seed_and_repeat() -> None:
    sampler = samplers.Uniform()
    first = epoch(sampler, 0, 500, 32, 5)
    assert first == epoch(sampler, 0, 500, 32, 5)
    assert first != epoch(sampler, 1, 500, 32, 5)
    assert first != epoch(sampler, 0, 500, 32, 6)
    assert first != list(range(500))


def test_order_is_evenly_spread() -> None:
    # The mean position of the first half of the rows, over many seeds, is the middle.
    means = [
        np.mean(np.argsort(epoch(samplers.Uniform(), 0, 200, 50, s))[:100]) for s in range(40)
    ]
    # Standard error of one mean is about 200 / sqrt(12 * 100) / sqrt(2), of 40 of them 0.65.
    assert abs(np.mean(means) - 99.5) < 4 * 0.65


def test_batches_stay_together() -> None:
    rows = epoch(samplers.Uniform(by_batch=True), 0, 100, 10, 5)
    parts = [rows[i : i + 10] for i in range(0, 100, 10)]
    assert all(part == list(range(part[0], part[0] + 10)) for part in parts)
    assert [part[0] for part in parts] != sorted(part[0] for part in parts)


@pytest.mark.parametrize(("rows", "batch"), [(100, 7), (70_000, 64), (70_001, 30_000)])
@pytest.mark.parametrize("by_batch", [False, True])
def test_many_steps_at_once_are_single_steps(by_batch: bool, rows: int, batch: int) -> None:
    sampler = samplers.Uniform(by_batch)
    settings = {"num_rows": rows, "batch_size": batch, "seed": 9}
    steps = sampler.steps_per_epoch(rows, batch)
    for first in (0, 3, steps - 1, 2 * steps + 5):
        together = sampler.batches(first, 9, **settings)
        for step, received in enumerate(together, first):
            np.testing.assert_array_equal(received, sampler.rows(step, **settings))


@pytest.mark.parametrize("size", [1000, 60_000, 65_537, 131_072, 1_000_003])
def test_permutations_look_random(size: int) -> None:
    # TensorFlow's index_shuffle fails here: its orders of two epochs correlate by 0.9.
    everything = np.arange(size)
    first, other = (samplers.permute(everything, size, (1, epoch)) for epoch in (0, 1))
    np.testing.assert_array_equal(np.sort(first), everything)
    assert (first == other).sum() < 12  # 1 is expected
    neighbours = (first[1:], first[:-1])
    for a, b in ((first, other), (first, everything), neighbours):
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(size)
    for a, b in ((first, other), (first, everything)):
        assert abs(chi_squared(a, b)) < 5
    steps = np.histogram(np.diff(first) % size, bins=20)[0]
    assert abs(((steps - steps.mean()) ** 2 / steps.mean()).sum() - 19) < 5 * np.sqrt(38)


def chi_squared(a: samplers.Rows, b: samplers.Rows) -> float:
    """Tests independence in a 10 x 10 table; standard normal when it holds."""
    counts = np.histogram2d(a, b, bins=10)[0]
    expected = len(a) / 100
    freedom = 81
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


def test_ten_million_rows_need_no_memory() -> None:
    tracemalloc.start()
    rows = samplers.Uniform().rows(3, num_rows=10_000_000, batch_size=64, seed=1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(set(rows)) == 64
    assert peak < 100_000  # bytes
