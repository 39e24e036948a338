"""Faults by schedule in real trainings: each ends with the weights of one without faults.

A few pairs of kind, moment and place; `python -m benchmarks.chaos` draws many.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.strikes import LIMIT_S, TOLERANCE, train
from tests.faults.training import Fault
from tests.places.clusters import Clusters, on

pytestmark = [pytest.mark.cluster, pytest.mark.waits, pytest.mark.timeout(2 * LIMIT_S)]

# The training has 58 steps, and a checkpoint every 4.
SCHEDULES = {
    "multi_worker killed": [
        Fault("kill", "saving", 20, "worker 0"),
        Fault("stop", "step", 40, "worker 1"),
    ],
    "multi_worker otherwise": [
        Fault("kill", "start", 0, "worker 1"),
        Fault("exception", "end", 0, "worker 0"),
    ],
    "horovod": [
        Fault("terminate", "step", 20, "worker 0"),
        Fault("kill", "step", 40, "worker 1"),
    ],
    "parameter_server": [
        Fault("kill", "step", 15, "ps 0"),
        Fault("kill", "saving", 24, "chief"),
    ],
}
UNDISTURBED = "tests.faults.training undisturbed"
CELLS = [
    pytest.param(name, place, marks=on(place, UNDISTURBED))
    for name in SCHEDULES
    for place in [f"{name.split()[0]}-2"]
]


@pytest.mark.parametrize(("name", "place"), CELLS)
def test_training_ends_with_the_same_weights(
    name: str, place: str, clusters: Clusters, tmp_path: Path
) -> None:
    expected = clusters.outcomes(place, UNDISTURBED)
    strategy, faults = name.split()[0], SCHEDULES[name]
    outcome = train(strategy, faults, tmp_path, expected)
    assert outcome.status == 0, outcome.printed
    assert outcome.struck == len(faults), outcome.printed
    assert outcome.distance <= TOLERANCE.get(strategy, 0.0), outcome.printed
    if any(fault.kind == "stop" for fault in faults):
        assert "is stopped (SIGSTOP" in outcome.printed
