"""The cost model, against sums by hand."""

from __future__ import annotations

import math

import pytest

from tfdist.cluster.cost import (
    Link,
    Rates,
    Work,
    link_of_all_reduce,
    parse_rate,
    pays_below,
    pipeline_s,
    rates_of_gpu,
)
from tfdist.errors import ArgumentError

pytestmark = pytest.mark.quick
LINK = Link(latency_s=0.5, bytes_per_s=100.0)


def test_collectives_are_sums_of_messages():
    # 4 workers, 400 bytes: 3 messages of 100 bytes for each half of an all-reduce.
    assert LINK.message_s(100) == 1.5
    assert LINK.all_gather_s(400, 4) == pytest.approx(3 * 1.5)
    assert LINK.all_reduce_s(400, 4) == pytest.approx(6 * 1.5)
    assert LINK.broadcast_s(100, 4) == pytest.approx(2 * 1.5)  # 1 to 2, 2 to 4
    assert LINK.broadcast_s(100, 5) == pytest.approx(3 * 1.5)
    for collective in (LINK.all_reduce_s, LINK.all_gather_s, LINK.broadcast_s):
        assert collective(400, 1) == 0


def test_a_server_serves_all_workers_through_one_link():
    assert LINK.parameter_server_s(100, 200, workers=2, servers=1) == pytest.approx(1 + 6)
    assert LINK.parameter_server_s(100, 200, workers=2, servers=2) == pytest.approx(1 + 3)
    assert LINK.parameter_server_s(100, 200, workers=1, servers=2) == pytest.approx(1 + 3)


@pytest.mark.parametrize("workers", [2, 3, 8])
@pytest.mark.parametrize("size", [0, 10, 1e6])
def test_a_measured_all_reduce_is_predicted_as_it_was(workers, size):
    link = link_of_all_reduce(0.01, 2e8, workers)
    assert link.all_reduce_s(size, workers) == pytest.approx(0.01 + size / 2e8)


def test_computing_is_a_roofline_with_a_constant_for_each_op():
    assert Rates(10.0, 5.0, 0.25).seconds(Work(20.0, 10.0, 4)) == 2 + 2 + 1
    assert pipeline_s(12.0, stages=3, microbatches=4) == 4.0 * 6 / 4


def test_compression_pays_where_it_saves_what_it_costs():
    limit = pays_below(1000, 0.5, workers=4)
    for factor, pays in ((0.9, True), (1.1, False)):
        link = Link(0.0, factor * limit)
        saved = link.all_reduce_s(2000, 4) - link.all_reduce_s(1000, 4)
        assert (saved > 0.5) == pays
    assert pays_below(1000, 0.0, 2) == math.inf


def test_gpus_are_found_by_their_longest_name():
    assert rates_of_gpu("NVIDIA L40S").source == "looked up: L40"
    assert rates_of_gpu("NVIDIA L4").source == "looked up: L4"
    assert rates_of_gpu("Another") is None


@pytest.mark.parametrize("text", ["", "fast", "1", "-1gbit", "0mbit", "1gb"])
def test_a_rate_must_have_a_unit(text):
    with pytest.raises(ArgumentError, match="Received: link="):
        parse_rate(text)
