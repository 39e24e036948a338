"""Plans of rounds: who trains, on which rows and where."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

import tfdist
from tests.strategies.devices import Devices
from tfdist.errors import ArgumentError
from tfdist.federated import clients as of
from tfdist.federated.plan import RoundPlan
from tfdist.samplers import Sequential, Uniform
from tfdist.strategies.base import Place

pytestmark = pytest.mark.quick
SIZES = (40, 7, 70, 1, 33)
IDS = np.random.default_rng(1).permutation(np.repeat(list("edcba"), SIZES))


def plan_of(replicas: int = 1, sampler: Any = None, **settings: Any) -> RoundPlan:
    devices = Devices(replicas)
    clients = of.of_ids(IDS, len(IDS), devices, is_local=False)
    averaging = tfdist.FedAvg(**settings)
    return RoundPlan(averaging, clients, devices.place, sampler or Uniform(), 16, seed=4)


def work_of(plan: RoundPlan, number: int, replicas: int) -> dict[int, tuple[float, list[Any]]]:
    """By client: its weight, and the rows of its local steps; from all replicas."""
    work: dict[int, tuple[float, list[Any]]] = {}
    for replica in range(replicas):
        part = plan.of_replica(number, replica)
        batches = [r[:n].tolist() for r, n in zip(part.rows, part.counts, strict=True)]
        for client, steps, weight in zip(part.clients, part.steps, part.weights, strict=True):
            assert client not in work
            work[int(client)] = float(weight), batches[:steps]
            batches = batches[steps:]
        assert not batches
    return work


@pytest.mark.parametrize("settings", [{"clients_per_round": 3}, {"keep_optimizer": True}, {}])
def test_rounds_are_the_same_for_any_number_of_replicas(settings):
    alone = plan_of(local_steps=5, **settings)
    for replicas in (2, 3):
        several = plan_of(replicas, local_steps=5, **settings)
        for number in (0, 3, 1):  # also out of order, as a continued training asks for them
            expected = work_of(alone, number, 1)
            assert work_of(several, number, replicas) == expected
            assert sum(weight for weight, _ in expected.values()) == pytest.approx(1)


def test_a_client_goes_through_its_own_rows_pass_by_pass():
    plan = plan_of(local_steps=2, clients_per_round=2)
    rows: dict[int, list[int]] = {}
    drawn = []
    for number in range(40):
        work = work_of(plan, number, 1)
        drawn.append(tuple(work))
        for client, (_, batches) in work.items():
            rows.setdefault(client, []).extend(row for batch in batches for row in batch)
    assert len(set(drawn)) > 5
    names = sorted(set(IDS))
    for client, taken in rows.items():
        own = np.flatnonzero(np.array(IDS) == names[client]).tolist()
        passes = len(taken) // len(own)
        assert passes > 0
        for number in range(passes):
            assert sorted(taken[number * len(own) :][: len(own)]) == own


def test_weights_are_by_rows_or_equal():
    sizes = dict(zip("edcba", SIZES, strict=True))
    by_rows = work_of(plan_of(local_epochs=2), 0, 1)
    for client, name in enumerate("abcde"):
        weight, batches = by_rows[client]
        assert weight == pytest.approx(sizes[name] / sum(SIZES))
        assert len(batches) == 2 * -(-sizes[name] // 16)
    equal = work_of(plan_of(weighting="uniform", clients_per_round=4), 0, 1)
    assert [weight for weight, _ in equal.values()] == [0.25] * 4


def test_clients_are_dealt_by_their_steps():
    plan = plan_of(2, local_epochs=1)
    planned = plan.round(0)
    loads = [int(planned.steps[planned.replicas == replica].sum()) for replica in (0, 1)]
    assert sorted(loads) == [6, 7]  # of 3, 1, 5, 1 and 3 steps
    kept = plan_of(2, local_epochs=1, keep_optimizer=True)
    places = set(zip(kept.round(0).replicas, kept._slots, strict=True))
    assert len(places) == 5
    assert kept.slots_per_replica == 3


def test_rows_are_dealt_once():
    place = Place(3, 0, 3)
    clients = of.of_replicas(100, place, seed=1)
    assert sorted(np.concatenate(list(clients.members.values()))) == list(range(100))
    assert clients.sizes.tolist() == [34, 33, 33]
    (alone,) = of.of_replicas(5, Place(), seed=1).members.values()
    assert alone.tolist() == [0, 1, 2, 3, 4]


def test_a_worker_without_rows_does_not_train():
    clients = of.of_workers([5, 0, 3], worker=1)
    place = Place(6, 2, 2, 3, 1)
    plan = RoundPlan(tfdist.FedAvg(local_steps=2), clients, place, Sequential(), 4, 1)
    planned = plan.round(7)
    assert planned.clients.tolist() == [0, 2]
    assert planned.replicas.tolist() == [0, 4]  # the first replica of each worker
    assert plan.of_replica(7, 2).counts.size == 0
    assert plan.of_replica(7, 2).longest == 2


class Workers(Devices):
    """Workers, each with what it tells: a problem, a table of clients, whether it counts."""

    def __init__(self, *told: Any) -> None:
        super().__init__(1)
        self.told = [(None, each, True) if isinstance(each, list) else each for each in told]

    def gather_objects(self, value: Any) -> list[Any]:
        assert value in self.told
        return list(self.told)


def test_ids_of_workers_own_rows():
    tables = [("a", 2), ("c", 1)], [("b", 3)]
    clients = of.of_ids(["c", "a", "a"], 3, Workers(*tables), is_local=True)
    assert clients.sizes.tolist() == [2, 3, 1]
    assert clients.workers.tolist() == [0, 1, 0]
    assert {c: r.tolist() for c, r in clients.members.items()} == {0: [1, 2], 2: [0]}
    with pytest.raises(ArgumentError, match="client 'a' on workers 0 and 1"):
        of.of_ids(["a", "a"], 2, Workers([("a", 2)], [("a", 1)]), is_local=True)


def test_one_client_is_not_two_by_ids_of_two_kinds():
    tables = [(4, 2)], (None, None, False), [("4", 1)]
    for ids in ([4, 4], ["4"]):  # on each worker
        with pytest.raises(ArgumentError, match="int on worker 0, str on worker 2"):
            of.of_ids(ids, len(ids), Workers(*tables), is_local=True)


def test_a_worker_without_rows_needs_no_ids():
    for ids, empty in (([], (None, [], False)), (None, (None, None, False))):
        workers = Workers(empty, [("b", 3)])
        assert of.of_ids(ids, 0, workers, is_local=True).sizes.tolist() == [3]
        assert of.of_ids(ids, 0, Workers(empty, (None, None, True)), is_local=True) is None
    assert of.of_ids(None, 4, Devices(1), is_local=False) is None


def test_what_is_wrong_on_one_worker_is_refused_on_all():
    unfit = "clients of shape (3,) and dtype int64, for 2 rows", None, True
    for ids, rows in (([1, 1, 1], 2), (["a"], 1)):
        workers = Workers([("a", 1)], unfit)
        with pytest.raises(ArgumentError, match=r"shape \(3,\) .* for 2 rows on worker 1\."):
            of.of_ids(ids, rows, workers, is_local=True)
    for ids in (None, ["a"]):
        workers = Workers([("a", 1)], (None, None, True))
        with pytest.raises(ArgumentError, match=r"none on worker 1 of 2\."):
            of.of_ids(ids, 1, workers, is_local=True)


@pytest.mark.parametrize(
    ("ids", "match"), [([0, 1], "shape"), ([[0]] * 3, "shape"), ([0.5] * 3, "float64")]
)
def test_ids_that_do_not_fit_are_refused(ids, match):
    with pytest.raises(ArgumentError, match=match):
        of.of_ids(ids, 3, Devices(1), is_local=False)


@pytest.mark.parametrize(
    "settings",
    [
        {"local_steps": 0},
        {"local_steps": True},
        {"local_steps": 1, "local_epochs": 1},
        {"server_optimizer": "sgd"},
        {"proximal": -1.0},
        {"proximal": True},
        {"proximal": float("nan")},
        {"clients_per_round": 1.5},
        {"weighting": "rows"},
        {"keep_optimizer": 1},
    ],
)
def test_settings_that_mean_nothing_are_refused(settings):
    with pytest.raises(ArgumentError, match=f"Received: {list(settings)[-1]}="):
        tfdist.FedAvg(**settings)


def test_numbers_of_numpy_are_numbers():
    settings = tfdist.FedAvg(local_steps=np.int64(3), proximal=np.float32(0.5))
    assert json.dumps(settings.describe()).startswith('{"local_steps": 3')
    assert settings.proximal == 0.5
