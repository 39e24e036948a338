"""The choice among strategies: what is recommended, and what never is."""

from __future__ import annotations

import dataclasses
import json

import pytest

from tfdist.cluster.cost import Link, Rates, Work
from tfdist.cluster.links import LinkMeasurement
from tfdist.errors import ArgumentError
from tfdist.strategies.choice.estimate import estimate_for, parse_size
from tfdist.strategies.choice.hardware import Hardware
from tfdist.strategies.choice.recommendation import recommend_for
from tfdist.strategies.choice.workload import StepMemory, Workload

pytestmark = pytest.mark.quick
MIB = 2**20
LOAD = Workload(
    model="net",
    batch_size=64,
    parameters=MIB,
    variables=4,
    weight_bytes=4 * MIB,
    gradient_bytes=4 * MIB,
    slot_bytes=8 * MIB,
    work=Work(1e9, 1e8, 100),
    memory={n: StepMemory(n * MIB, (n + 4) * MIB, n * 1024) for n in (64, 32, 16)},
    measured_s={(64, 2): 1.0, (32, 1): 0.6},
)
HERE = Hardware(1, 2, 8 * 2**30, rates=Rates(1e11, 1e10, 1e-6))
FAST = (LinkMeasurement("multi_worker", 2, 1, 1e-3, 1e9, "2026-01-01T00:00:00Z"),)


def of(found, strategy):
    return next(c for c in found.candidates if c.strategy == strategy)


def test_the_fastest_is_recommended_with_its_reason_and_command():
    found = recommend_for(LOAD, dataclasses.replace(HERE, links=FAST), script="train.py")
    assert found.best.strategy == "multi_worker"
    # alpha + bytes / beta, as measured, and the loop's overhead in both
    assert found.best.communication_s == pytest.approx(1e-3 + 4 * MIB / 1e9)
    assert found.best.compute_s == pytest.approx(of(found, "single").compute_s - 0.4)
    assert found.command == "tfdist run -n 2 train.py"
    assert "times as fast" in found.reason
    assert "measured 2026-01-01" in str(found)


def test_a_slow_link_makes_one_process_best():
    slow = dataclasses.replace(HERE, hosts=2, network=Link(1e-3, 1e6, "given, slow"))
    found = recommend_for(LOAD, slow, workers=2)
    assert found.best.strategy == "single"
    assert of(found, "multi_worker").communication_s == pytest.approx(2e-3 + 4 * MIB / 1e6)
    assert any("compression" in line for line in found.advice)


def test_what_is_refused_or_changes_the_result_is_never_recommended():
    fast = dataclasses.replace(HERE, links=FAST)
    names = ("multi_worker", "horovod", "zero 1", "zero 3", "model parallel")
    load = dataclasses.replace(LOAD, refused=dict.fromkeys(names, "because"))
    found = recommend_for(load, fast)
    assert {found.best.strategy, found.second.strategy} == {"parameter_server", "single"}
    assert of(found, "federated").step_s < found.best.step_s
    assert not of(found, "federated").is_possible
    assert of(found, "zero 1").obstacle == "because"


def test_replicas_that_cannot_share_a_batch_are_no_faster():
    load = dataclasses.replace(LOAD, indivisible="the loss ranks rows")
    found = recommend_for(load, dataclasses.replace(HERE, links=FAST))
    assert found.best.strategy == "single"
    assert "the loss ranks rows" in found.reason


def test_what_does_not_fit_is_not_recommended():
    gpus = dataclasses.replace(HERE, gpus=("A100",) * 4, gpu_bytes=80 * MIB)
    # One device: 4 + 8 + 68 MiB and the input's buffers. Four: 4 + 8 + 20.
    found = recommend_for(dataclasses.replace(LOAD, refused={"pipeline": "x"}), gpus)
    assert not of(found, "single").fits
    assert of(found, "mirrored").fits
    assert of(found, "mirrored").memory_bytes == (4 + 8 + 20) * MIB + 3 * 16 * 1024
    assert found.best is not None
    assert found.best.strategy != "single"
    none = recommend_for(LOAD, dataclasses.replace(gpus, gpu_bytes=MIB))
    assert none.best is None
    assert none.reason.startswith("No strategy fits")


def test_json_and_html_have_every_strategy():
    found = recommend_for(LOAD, HERE)
    values = json.loads(json.dumps(found.to_dict()))
    assert len(values["strategies"]) == len(found.candidates) == 10
    assert values["recommended"]["strategy"] == found.best.strategy
    assert all(c.strategy in found._repr_html_() for c in found.candidates)


def test_zero_divides_state_and_weights():
    found = estimate_for({"float32": LOAD}, HERE, replicas=4, limit=40 * 2**30)
    rows = {(row.replicas, row.state): row.memory for row in found.rows}
    assert rows[4, "whole"]["weights"] == 4 * MIB
    assert rows[4, "zero 1"] == rows[4, "whole"] | {"optimizer": 2 * MIB}
    assert rows[4, "zero 3"]["weights"] == MIB
    assert rows[1, "whole"]["activations"] == 64 * MIB
    assert found.fits
    assert not found.remedies


def test_an_estimate_says_what_would_make_it_fit():
    limit = 446 * MIB  # the process 400, weights and slots 12, the step 68 or 36
    found = estimate_for({"float32": LOAD}, HERE, replicas=2, limit=limit)
    assert not found.fits
    assert found.remedies[0] == "2 workers with tfdist.Zero(1): 444 MiB."
    assert "batch_size=16 with gradient_accumulation_steps=4" in str(found)


def test_a_size_must_have_a_unit():
    with pytest.raises(ArgumentError, match="For example: 16GiB"):
        parse_size("16")
