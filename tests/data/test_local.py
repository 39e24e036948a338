"""Rows of their own for each worker: what is exchanged, and which rows make a batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import tfdist
from tfdist.cluster import Cluster
from tfdist.data.local import LocalArrays, bind
from tfdist.data.local_rows import RowsPerWorker, exchange
from tfdist.errors import ArgumentError
from tfdist.samplers import ClassBalanced, Stratified, Uniform
from tfdist.strategies.base import Place
from tfdist.strategies.single import Single

pytestmark = pytest.mark.quick
ALONE = Single(Cluster.from_environment())


def arrays_of(rows: list[int], sampler: Any, place: Place, **options: Any) -> LocalArrays:
    """What the worker of a place holds: row r of the global data set has the value r."""
    holdings = options.pop("holdings", None) or RowsPerWorker(rows, None, [])
    worker = place.worker_index
    first, end = holdings.first_rows[worker : worker + 2]
    column = tf.range(first, end, dtype=tf.float32)[:, None]
    made = bind(sampler, holdings)
    steps = made.steps_per_epoch(sum(rows), 16)
    return LocalArrays(
        ((column + 1.0),),
        made,
        16,
        5,
        batches=steps,
        spans_passes=True,
        holdings=holdings,
        worker=worker,
        order=options.pop("order", None),
    )


def places(workers: int, local: int) -> list[Place]:
    return [Place(workers * local, local * w, local, workers, w) for w in range(workers)]


@pytest.mark.parametrize("rows", [[40, 40, 40], [1, 100, 0], [0, 0, 7], [3, 1, 200]])
@pytest.mark.parametrize("local", [1, 2])
def test_every_row_of_a_batch_is_computed_once_by_its_holder(rows, local):
    sources = [(place, arrays_of(rows, Uniform(), place)) for place in places(3, local)]
    streams = [iter(source.shares(place)) for place, source in sources]
    steps = sources[0][1].steps
    assert {source.steps for _, source in sources} == {steps}
    seen: list[float] = []
    for _ in range(steps):
        shares = [next(stream) for stream in streams for _ in range(local)]
        total = int(shares[0].total)
        assert sum(int(share.rows) for share in shares) == total
        offset = 0
        for share in shares:
            assert int(share.total) == total
            assert int(share.offset) == offset
            offset += int(share.rows)
            values = share.data[0].numpy().ravel().tolist()
            assert len(values) == max(1, int(share.rows))
            seen += values[: int(share.rows)]
    assert sorted(seen) == list(range(1, sum(rows) + 1))


def test_a_share_without_rows_carries_zeros():
    place = places(2, 1)[0]
    source = arrays_of([0, 9], Uniform(), place)
    share = next(iter(source.shares(place)))
    assert int(share.rows) == 0
    np.testing.assert_array_equal(share.data[0], [[0.0]])


def test_classes_are_drawn_over_all_workers():
    holdings = RowsPerWorker([50, 10], [0, 1], [[50, 0], [5, 5]])
    place = places(2, 1)[1]
    order = np.array([1, 3, 5, 7, 9, 0, 2, 4, 6, 8])  # its rows of class 0, then of class 1
    source = arrays_of([50, 10], ClassBalanced(), place, holdings=holdings, order=order)
    drawn = np.concatenate(
        [
            share.data[0].numpy().ravel()[: int(share.rows)]
            for share in source.shares(place).take(source.steps)
        ]
    )
    local = (drawn - 51).astype(int)
    counts = np.bincount(local, minlength=10)
    rare, common = counts[[0, 2, 4, 6, 8]], counts[[1, 3, 5, 7, 9]]
    assert rare.min() >= 5 * common.max()


def test_labels_are_made_up_from_counts():
    holdings = RowsPerWorker([3, 2], ["cat", "dog"], [[1, 2], [2, 0]])
    assert holdings.labels().tolist() == ["cat", "dog", "dog", "cat", "cat"]
    several = RowsPerWorker([2, 1], [(), (0, 2)], [[1, 1], [0, 1]], columns=3)
    np.testing.assert_array_equal(several.labels(), [[0, 0, 0], [1, 0, 1], [1, 0, 1]])
    assert RowsPerWorker([2, 1], None, []).labels() is None


def test_what_a_worker_tells():
    holdings, order = exchange(ALONE, 4, np.array([1, 0, 1, 0]))
    assert (holdings.rows, holdings.names, holdings.counts) == ([4], [0, 1], [[2, 2]])
    assert order.tolist() == [1, 3, 0, 2]
    holdings, order = exchange(ALONE, 2, np.array([0.5, 1.5]))
    assert (holdings.names, order) == (None, None)
    with pytest.raises(ArgumentError, match="At least one worker"):
        exchange(ALONE, 0, np.zeros(0, int))


@pytest.mark.parametrize(
    ("counts", "skew"),
    [
        ([[5, 5], [50, 50]], 0.0),
        ([[5, 0], [0, 7]], 1.0),
        ([[5, 0], [0, 7], [0, 0]], 1.0),
        ([[1, 2, 3]], None),
    ],
)
def test_skew(counts, skew):
    found = RowsPerWorker(
        [sum(row) for row in counts], list(range(len(counts[0]))), counts
    ).skew()
    assert found == pytest.approx(skew, abs=1e-12)


def test_skew_between_the_ends():
    skew = RowsPerWorker([100, 100], [0, 1], [[90, 10], [10, 90]]).skew()
    # The mutual information of class and worker, in bits; a worker is worth one.
    assert skew == pytest.approx(1 + 0.9 * np.log2(0.9) + 0.1 * np.log2(0.1))


def test_report():
    holdings = RowsPerWorker([30, 10], [0, 1], [[30, 0], [5, 5]])
    source = arrays_of([30, 10], Stratified(), places(2, 1)[0], holdings=holdings)
    lines = source.report().splitlines()
    assert lines[1].split() == [
        "worker",
        "rows",
        "rows",
        "a",
        "step",
        "class",
        "0",
        "class",
        "1",
    ]
    assert lines[2].split()[:2] == ["0", "30"]
    assert lines[3].split()[-2:] == ["50.0%", "50.0%"]
    assert "skew of the classes between workers: 0.36" in lines[4]
    assert "worker 0 computes 75% of the rows" in lines[5]


def test_workers_that_weigh_the_same():
    holdings = RowsPerWorker([90, 10, 0], None, [])
    weights = [holdings.weight_of(worker) for worker in range(2)]
    assert weights == pytest.approx([100 / 180, 100 / 20])
    assert sum(n * w for n, w in zip(holdings.rows, weights, strict=False)) == pytest.approx(
        100
    )


def test_one_process_needs_no_exchange():
    with pytest.raises(ArgumentError, match="weight_by"):
        tfdist.LocalShard(weight_by="rows")
    with pytest.raises(ArgumentError, match="that are not classes"):
        bind(ClassBalanced(), RowsPerWorker([2], None, []))
