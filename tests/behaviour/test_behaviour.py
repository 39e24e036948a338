"""Every check of a strategy, in one process, on two devices and on two workers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.behaviour.program import checks_of
from tests.jobs import Job, on_place, running, workers_of

PLACES = ["single-1", "mirrored-2", "multi_worker-2", "horovod-2", "parameter_server-2"]
LIMIT = 1800  # seconds for a job, of which two run beside other tests

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(2 * LIMIT)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {place: tmp_path_factory.mktemp(place) for place in PLACES}


@pytest.fixture(scope="module")
def jobs(folders: dict[str, Path]) -> Iterator[dict[str, Job]]:
    made = {
        place: Job(on_place(place, "tests.behaviour.program", folder), folder / "log")
        for place, folder in folders.items()
    }
    with running(list(made.values())):
        yield made


@pytest.mark.parametrize(
    ("place", "check"),
    [(place, check) for place in PLACES for check in checks_of(place.rsplit("-", 1)[0])],
)
def test_holds(check: str, place: str, jobs: dict[str, Job], folders: dict[str, Path]) -> None:
    passes(check, place, jobs, folders)


def passes(check: str, place: str, jobs: dict[str, Job], folders: dict[str, Path]) -> None:
    outcomes = [
        jobs[place].wait_for(folders[place] / f"{check}.worker-{worker}", LIMIT)
        for worker in range(workers_of(place))
    ]
    if outcomes[0].startswith("skipped"):
        pytest.skip(outcomes[0])
    assert outcomes == ["passed"] * len(outcomes), "\n".join(outcomes)
