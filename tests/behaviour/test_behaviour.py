"""Every check of `checks.py`, in one process, on two devices and on two workers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.behaviour.checks import CHECKS
from tests.jobs import Job, running, tfdist_run

PLACES = {"single-1": 1, "mirrored-2": 1, "multi_worker-2": 2}
LIMIT = 900

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(2 * LIMIT)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {place: tmp_path_factory.mktemp(place) for place in PLACES}


@pytest.fixture(scope="module")
def jobs(folders: dict[str, Path]) -> Iterator[dict[str, Job]]:
    made = {
        place: Job(program(place, folders[place]), folders[place] / "log") for place in PLACES
    }
    with running(list(made.values())):
        yield made


@pytest.fixture(scope="module", params=PLACES)
def place(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def program(place: str, folder: Path) -> list[str]:
    strategy, replicas = place.rsplit("-", 1)
    arguments = ["-m", "tests.behaviour.program", str(folder), strategy, replicas]
    if PLACES[place] == 1:
        return [sys.executable, *arguments]
    return tfdist_run(PLACES[place], *arguments)


@pytest.mark.parametrize("check", CHECKS)
def test_holds(check: str, place: str, jobs: dict[str, Job], folders: dict[str, Path]) -> None:
    outcomes = [
        jobs[place].wait_for(folders[place] / f"{check}.worker-{worker}", LIMIT)
        for worker in range(PLACES[place])
    ]
    if outcomes[0].startswith("skipped"):
        pytest.skip(outcomes[0])
    assert outcomes == ["passed"] * len(outcomes), "\n".join(outcomes)
