"""The promise: final weights and history equal those of one process, wherever it ran."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.equivalence.cases import CASES
from tests.jobs import Job, on_place, running, workers_of

NAMES = [
    "multi_worker-2",
    "mirrored-2",
    "multi_worker-3",
    "mirrored-4",
    "horovod-2",
    "horovod-3",
    "parameter_server-2",
    "parameter_server-3",
]
# What a replica computes does not depend on how it is summed: every case runs on 2 replicas of
# each strategy, and on 3 with Horovod. Elsewhere those run whose shares or sums may differ with
# the number of replicas.
ROWS = [name for name in CASES if name.startswith("rows_")]
SUMMED = [
    *ROWS,
    "poisson_some_batches_empty",
    "gradient_accumulation",
    "cnn_synchronized_batch_norm",
    "embedding_lstm",
    "dropout",
    "own_train_step",
    "private",
]
FEWER = {"multi_worker-3": SUMMED, "mirrored-4": SUMMED, "parameter_server-3": ROWS}
OLDEST = {"multi_worker-2": CASES, "mirrored-2": ROWS}
PAIRS = [
    pytest.param(place, case, marks=pytest.mark.oldest if case in OLDEST.get(place, ()) else ())
    for place in NAMES
    for case in FEWER.get(place, CASES)
]
LIMIT = 1500  # seconds for a job
# In half precision the sum over a share is rounded to 11 bits before shares are summed.
TOLERANCE = {"mixed_precision": 1e-3, "private_class_weight_and_mixed_precision": 1e-3}

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(2 * LIMIT)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("equivalence")


@pytest.fixture(scope="module")
def jobs(request: pytest.FixtureRequest, folder: Path) -> Iterator[dict[str, Job]]:
    wanted = {
        (item.callspec.params["place"], item.callspec.params["case"])
        for item in request.session.items
        if item.path == request.path
    }
    wanted |= {("single-1", case) for _, case in wanted}
    made = {}
    for place in ("single-1", *NAMES):
        cases = [case for case in CASES if (place, case) in wanted]
        if cases:
            command = on_place(place, "tests.equivalence.program", folder, *cases)
            made[place] = Job(command, folder / f"{place}.log")
    with running(list(made.values()), at_once=1):  # other tests run beside it
        yield made


@pytest.mark.parametrize(("place", "case"), PAIRS)
def test_same_training(case: str, place: str, jobs: dict[str, Job], folder: Path) -> None:
    expected = jobs["single-1"].wait_for(folder / f"{case}.single-1", LIMIT)
    received = jobs[place].wait_for(folder / f"{case}.{place}", LIMIT)
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


@pytest.mark.parametrize(("place", "case"), PAIRS)
def test_model_is_plain_afterwards(
    case: str, place: str, jobs: dict[str, Job], folder: Path
) -> None:
    assert jobs[place].wait_for(folder / f"{case}.{place}", LIMIT)["plain"]


@pytest.mark.parametrize(
    ("place", "case"), [pair for pair in PAIRS if workers_of(pair.values[0]) > 1]
)
def test_workers_hold_the_same(
    case: str, place: str, jobs: dict[str, Job], folder: Path
) -> None:
    chief = jobs[place].wait_for(folder / f"{case}.{place}", LIMIT)
    other = jobs[place].wait_for(folder / f"{case}.{place}.other", LIMIT)
    for name in ("weights", "optimizer"):
        for theirs, ours in zip(other[name], chief[name], strict=True):
            for a, b in zip(theirs, ours, strict=True):
                np.testing.assert_array_equal(a, b)
    assert other["history"] == chief["history"]
