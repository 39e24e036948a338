"""Samplers are functions of the seed and the step, and draw every row once an epoch."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tfdist import samplers

pytestmark = pytest.mark.quick


def epoch(
    sampler: samplers.Sampler, number: int, rows: int, batch: int, seed: int
) -> list[int]:
    steps = sampler.steps_per_epoch(rows, batch)
    drawn = [
        sampler.rows(
            tf.constant(number * steps + step, tf.int64),
            num_rows=rows,
            batch_size=batch,
            seed=seed,
        ).numpy()
        for step in range(steps)
    ]
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


def test_ten_million_rows_need_no_memory() -> None:
    rows = samplers.Uniform().rows(
        tf.constant(3, tf.int64), num_rows=10_000_000, batch_size=64, seed=1
    )
    assert rows.shape == (64,)
    assert len(set(rows.numpy())) == 64
