"""Faults by schedule in real trainings: each ends with the weights of one without faults.

A few pairs of kind, moment and place; `python -m benchmarks.chaos` draws many.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.faults.strikes import (
    LIMIT_S,
    LIMITS,
    TOLERANCE,
    TRAINING,
    distance_of,
    state_of,
    train,
)
from tests.faults.training import STEPS_PER_EPOCH, Fault
from tests.places.clusters import Clusters, on

pytestmark = [pytest.mark.cluster, pytest.mark.waits, pytest.mark.timeout(2 * LIMIT_S)]

# The training has 58 steps, and a checkpoint every 4.
SCHEDULES = {
    "multi_worker killed": [
        Fault("kill", "saving", 20, "worker 0"),
        Fault("stop", "step", 40, "worker 1"),
    ],
    "multi_worker otherwise": [
        Fault("exception", "end", 0, "worker 0"),
        Fault("kill", "private", 11, "worker 1"),
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
    counts = list(tmp_path.glob("ledger-*"))
    assert len(counts) == 2 * any(fault.moment == "private" for fault in faults)
    for path in counts:  # what may have been seen is counted
        made = (tmp_path / path.name.replace("ledger", "private")).stat().st_size
        assert STEPS_PER_EPOCH < made <= int(path.read_text()) <= made + 2
    if any(fault.kind == "stop" for fault in faults):
        assert "is stopped (SIGSTOP" in outcome.printed


@pytest.mark.full
@on("multi_worker-2", UNDISTURBED)
@pytest.mark.parametrize(
    ("of_two", "of_three"),
    [
        ("--zero 1", "--zero 1"),
        ("--mesh batch=1,model=2", "--mesh batch=1,model=3"),
    ],
)
def test_a_killed_training_in_parts_goes_on_with_other_workers(
    clusters, tmp_path, of_two, of_three
) -> None:
    faults = [Fault("kill", "saving", 20, "worker 1"), Fault("kill", "step", 40, "worker 2")]
    (tmp_path / "faults.json").write_text(json.dumps([asdict(fault) for fault in faults]))
    for workers, options in ((2, of_two.split()), (3, of_three.split()), (1, [])):
        command = [sys.executable, "-m", "tfdist.cli", "run", "--output", "all"]
        command += ["-n", str(workers), *options]
        done = subprocess.run(
            [*command, str(TRAINING), str(tmp_path)],
            env={**os.environ, **LIMITS},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        printed = done.stdout + done.stderr
        assert (done.returncode == 0) == (workers == 1), printed
    lines = [line.split() for line in (tmp_path / "steps-worker-0").read_text().splitlines()]
    first = {pid: int(step) for _, step, pid in reversed(lines)}
    begun = [first[pid] for pid in dict.fromkeys(pid for *_, pid in lines)]
    assert 1 == begun[0] < begun[1] <= 21 < begun[2] <= 41  # each goes on where one was killed
    expected = clusters.outcomes("multi_worker-2", UNDISTURBED)
    assert distance_of(state_of(tmp_path), expected[:1]) < 1e-5
