"""Every check of `checks.py`, in one process, on two devices and on two workers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.behaviour.checkpoint_checks import CHECKPOINT_CHECKS
from tests.behaviour.checks import CHECKS
from tests.behaviour.horovod_checks import HOROVOD_CHECKS
from tests.behaviour.local_checks import LOCAL_CHECKS
from tests.behaviour.server_checks import SERVER_CHECKS
from tests.jobs import Job, on_place, running, workers_of

PLACES = ["single-1", "mirrored-2", "multi_worker-2", "horovod-2", "parameter_server-2"]
LIMIT = 900

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


@pytest.fixture(scope="module", params=PLACES)
def place(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.mark.parametrize("check", CHECKS | CHECKPOINT_CHECKS)
def test_holds(check: str, place: str, jobs: dict[str, Job], folders: dict[str, Path]) -> None:
    passes(check, place, jobs, folders)


@pytest.mark.parametrize("check", HOROVOD_CHECKS)
@pytest.mark.parametrize("place", ["horovod-2"])
def test_horovod(
    check: str, place: str, jobs: dict[str, Job], folders: dict[str, Path]
) -> None:
    passes(check, place, jobs, folders)


@pytest.mark.parametrize("check", SERVER_CHECKS)
@pytest.mark.parametrize("place", ["parameter_server-2"])
def test_parameter_server(
    check: str, place: str, jobs: dict[str, Job], folders: dict[str, Path]
) -> None:
    passes(check, place, jobs, folders)


def passes(check: str, place: str, jobs: dict[str, Job], folders: dict[str, Path]) -> None:
    outcomes = [
        jobs[place].wait_for(folders[place] / f"{check}.worker-{worker}", LIMIT)
        for worker in range(workers_of(place))
    ]
    if outcomes[0].startswith("skipped"):
        pytest.skip(outcomes[0])
    assert outcomes == ["passed"] * len(outcomes), "\n".join(outcomes)


@pytest.mark.parametrize("check", LOCAL_CHECKS)
@pytest.mark.parametrize("place", ["multi_worker-2", "horovod-2"])
def test_rows_of_workers(
    check: str, place: str, jobs: dict[str, Job], folders: dict[str, Path]
) -> None:
    passes(check, place, jobs, folders)
