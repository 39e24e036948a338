"""The promise: final weights and history equal those of one process, wherever it ran."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.equivalence.cases import CASES
from tests.jobs import Job, running, tfdist_run

PLACES = {
    "mirrored-2": 1,
    "mirrored-3": 1,
    "mirrored-4": 1,
    "multi_worker-2": 2,
    "multi_worker-3": 3,
}
LIMIT = 900  # seconds until a job must have come to a case; jobs take minutes
# In half precision the sum over a share is rounded to 11 bits before shares are summed.
TOLERANCE = {"mixed_precision": 1e-3}

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(LIMIT + 60)]
Results = Callable[[str, str], dict[str, Any]]


@pytest.fixture(scope="module", params=PLACES)
def place(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("equivalence")


def program(place: str, workers: int, folder: Path) -> list[str]:
    strategy, replicas = place.rsplit("-", 1)
    arguments = ["-m", "tests.equivalence.program", str(folder), strategy, replicas]
    return [sys.executable, *arguments] if workers == 1 else tfdist_run(workers, *arguments)


@pytest.fixture(scope="module")
def single(folder: Path) -> Iterator[Job]:
    with running(program("single-1", 1, folder), folder / "single-1.log") as job:
        yield job


@pytest.fixture(scope="module")
def job(place: str, folder: Path, single: Job) -> Iterator[Job]:
    with running(program(place, PLACES[place], folder), folder / f"{place}.log") as started:
        yield started


@pytest.mark.parametrize("case", CASES)
def test_same_training(case: str, place: str, job: Job, single: Job, folder: Path) -> None:
    expected = single.wait_for(folder / f"{case}.single-1", LIMIT)
    received = job.wait_for(folder / f"{case}.{place}", LIMIT)
    assert "error" not in expected, expected["error"]
    assert "error" not in received, received["error"]
    tolerance = TOLERANCE.get(case, 1e-5)
    for there, here in zip(received["weights"], expected["weights"], strict=True):
        for theirs, ours in zip(there, here, strict=True):
            assert np.isfinite(ours).all()
            distance = np.linalg.norm(np.subtract(theirs, ours, dtype=np.float64))
            assert distance <= tolerance * (np.linalg.norm(ours) + 1e-9)
    assert received["history"].keys() == expected["history"].keys()
    for name, values in expected["history"].items():
        np.testing.assert_allclose(received["history"][name], values, tolerance, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_model_is_plain_afterwards(case: str, place: str, job: Job, folder: Path) -> None:
    assert job.wait_for(folder / f"{case}.{place}", LIMIT)["plain"]


@pytest.mark.parametrize("case", CASES)
def test_workers_hold_the_same(case: str, place: str, job: Job, folder: Path) -> None:
    if PLACES[place] == 1:
        pytest.skip("one process")
    chief = job.wait_for(folder / f"{case}.{place}", LIMIT)
    other = job.wait_for(folder / f"{case}.{place}.other", LIMIT)
    for name in ("weights", "optimizer"):
        for theirs, ours in zip(other[name], chief[name], strict=True):
            for a, b in zip(theirs, ours, strict=True):
                np.testing.assert_array_equal(a, b)
    assert other["history"] == chief["history"]
