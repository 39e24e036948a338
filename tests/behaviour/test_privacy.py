"""Every check of `privacy_checks.py` on one, two and three replicas."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.behaviour.privacy_checks import PRIVACY_CHECKS
from tests.behaviour.test_behaviour import LIMIT, passes
from tests.jobs import Job, on_place, running

PLACES = [
    "single-1",
    "mirrored-2",
    "mirrored-3",
    "multi_worker-2",
    "multi_worker-3",
    "horovod-2",
    "parameter_server-2",
]

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(2 * LIMIT)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {place: tmp_path_factory.mktemp(place) for place in PLACES}


@pytest.fixture(scope="module")
def jobs(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Iterator[dict[str, Job]]:
    wanted = {
        item.callspec.params["place"]
        for item in request.session.items
        if item.path == request.path
    }
    program = "tests.behaviour.program"
    made = {
        place: Job(on_place(place, program, folder, *PRIVACY_CHECKS), folder / "log")
        for place, folder in folders.items()
        if place in wanted
    }
    with running(list(made.values())):
        yield made


@pytest.mark.parametrize("check", PRIVACY_CHECKS)
@pytest.mark.parametrize("place", PLACES)
def test_holds(check: str, place: str, jobs: dict[str, Job], folders: dict[str, Path]) -> None:
    passes(check, place, jobs, folders)
