"""Faults by schedule in real trainings: each ends with the weights of one without faults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.chaos import LIMIT_S, TOLERANCE, Fault, state_of, train

pytest.importorskip("sklearn")
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(2 * LIMIT_S)]

# The training has 58 steps, and a checkpoint every 4.
SCHEDULES = {
    "multi_worker killed": [
        Fault("kill", "start", 0, "worker 1"),
        Fault("kill", "step", 10, "worker 1"),
        Fault("kill", "saving", 20, "worker 0"),
        Fault("kill", "step", 30, "worker 0"),
        Fault("kill", "end", 0, "worker 1"),
    ],
    "multi_worker otherwise": [
        Fault("slow", "step", 5, "worker 0"),
        Fault("terminate", "step", 10, "worker 1"),
        Fault("exception", "step", 20, "worker 0"),
        Fault("stop", "step", 30, "worker 1"),
        Fault("memory", "step", 40, "worker 1"),
    ],
    "horovod": [
        Fault("kill", "start", 0, "worker 0"),
        Fault("terminate", "step", 10, "worker 0"),
        Fault("stop", "saving", 20, "worker 0"),
        Fault("kill", "step", 40, "worker 1"),
        Fault("exception", "end", 0, "worker 0"),
    ],
    "parameter_server": [
        Fault("kill", "step", 10, "worker 1"),
        Fault("kill", "step", 15, "ps 0"),
        Fault("kill", "saving", 20, "chief"),
        Fault("terminate", "step", 35, "chief"),
        Fault("stop", "step", 45, "worker 0"),
    ],
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Gives the state that a place's training ends with when nothing strikes."""
    known: dict[str, Any] = {}

    def of(place: str) -> Any:
        if place not in known:
            folder = tmp_path_factory.mktemp(place)
            outcome = train(place, [], folder)
            assert outcome.status == 0, outcome.printed
            known[place] = state_of(folder)
        return known[place]

    return of


@pytest.mark.parametrize("name", SCHEDULES)
def test_training_ends_with_the_same_weights(name: str, expected: Any, tmp_path: Path) -> None:
    place, faults = name.split()[0], SCHEDULES[name]
    outcome = train(place, faults, tmp_path, expected(place))
    assert outcome.status == 0, outcome.printed
    assert outcome.struck == len(faults), outcome.printed
    assert outcome.distance <= TOLERANCE.get(place, 0.0), outcome.printed
    if any(fault.kind == "stop" for fault in faults):
        assert "is stopped (SIGSTOP" in outcome.printed
