"""Every check of `checks.py`, in one process, on two devices and on two workers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.behaviour.checks import CHECKS
from tests.jobs import Job, running, tfdist_run

PLACES = {"single-1": 1, "mirrored-2": 1, "multi_worker-2": 2}
LIMIT = 600

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(LIMIT + 60)]


@pytest.fixture(scope="module", params=PLACES)
def place(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def folder(place: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp(place)


@pytest.fixture(scope="module")
def job(place: str, folder: Path) -> Iterator[Job]:
    strategy, replicas = place.rsplit("-", 1)
    arguments = ["-m", "tests.behaviour.program", str(folder), strategy, replicas]
    workers = PLACES[place]
    command = [sys.executable, *arguments] if workers == 1 else tfdist_run(workers, *arguments)
    with running(command, folder / "log") as started:
        yield started


@pytest.mark.parametrize("check", CHECKS)
def test_holds(check: str, place: str, job: Job, folder: Path) -> None:
    outcomes = [
        job.wait_for(folder / f"{check}.worker-{worker}", LIMIT)
        for worker in range(PLACES[place])
    ]
    if outcomes[0].startswith("skipped"):
        pytest.skip(outcomes[0])
    assert outcomes == ["passed"] * len(outcomes), "\n".join(outcomes)
