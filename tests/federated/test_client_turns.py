"""Clients that take turns, with noise of which later rounds subtract a part."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import dp_accounting as dp
import keras
import numpy as np
import pytest

import tfdist
from tests.behaviour.checkpoint_checks import Stop, StoppedError
from tests.federated.reference import federated_averaging, in_float64, model_of, rows_of
from tests.strategies.devices import Devices
from tfdist.errors import ArgumentError, CheckpointError
from tfdist.federated import clients as of
from tfdist.federated.plan import RoundPlan
from tfdist.privacy import Ledger, Phase
from tfdist.samplers import Sequential

SIZES = (40, 7, 70, 1, 33, 20)
PARTS = rows_of(*SIZES)
X, Y = (np.concatenate(arrays) for arrays in zip(*PARTS, strict=True))
IDS = np.repeat(range(len(SIZES)), SIZES)
OPTIONS: dict[str, Any] = {"batch_size": 16, "shuffle": False, "seed": 5, "verbose": 0}


def averaging(clients: Any = IDS, **settings: Any) -> Any:
    given = {
        "l2_norm_clip": 0.2,
        "noise_multiplier": 4.0,
        "delta": 1e-2,
        "turns": 3,
        "bands": 4,
    }
    privacy = tfdist.ClientDPFTRL(**{**given, **settings})
    return tfdist.FedAvg(clients=clients, local_steps=2, weighting="uniform", privacy=privacy)


def plan_of(federated: Any, clients: Any, seed: int = 5) -> RoundPlan:
    devices = Devices(1)
    found = of.of_ids(clients, len(clients), devices, is_local=False)
    return RoundPlan(federated, found, devices.place, Sequential(), 16, seed)


def mixing(rounds: int, factors: tuple[float, ...]) -> Any:
    """The matrix that makes the noise of rounds of independent noise."""
    return sum(f * np.eye(rounds, k=-lag) for lag, f in enumerate(factors))


FACTORS = (1.0, -1 / 2, -1 / 8, -1 / 16)  # of the square root of 1 - x


@pytest.mark.quick
@pytest.mark.parametrize(("turns", "rounds"), [(1, 5), (3, 10), (20, 10)])
def test_epsilon_is_that_of_one_gaussian_mechanism(turns: int, rounds: int) -> None:
    """Its sensitivity is that of a client in all rounds of its turn, by a matrix of NumPy."""
    matrix = np.linalg.inv(mixing(rounds, FACTORS))
    norms = [
        np.linalg.norm(matrix[:, first::turns].sum(1)) for first in range(min(turns, rounds))
    ]
    expected = dp.get_epsilon_gaussian(4.0 / max(norms), 1e-2)
    phase = Phase(1.0, 4.0, rounds, num_rows=6, unit="client", bands=4, separation=turns)
    ledger = Ledger((phase,))
    assert ledger.epsilon(1e-2, relation="replace_special") == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ArgumentError, match="relation"):
        ledger.epsilon(1e-2)
    assert "rounds of DP-FTRL, each client's update clipped" in tfdist.privacy.statement(
        ledger, delta=1e-2, relation="replace_special"
    )


@pytest.mark.quick
def test_each_client_takes_part_once_in_all_turns() -> None:
    clients = np.arange(20)
    plan = plan_of(averaging(clients, turns=6), clients)
    rounds = [set(plan.chosen(number).tolist()) for number in range(12)]
    assert rounds[:6] == rounds[6:]
    assert sorted(client for group in rounds[:6] for client in group) == list(range(20))
    assert {len(group) for group in rounds} == {3, 4}
    other = plan_of(averaging(clients, turns=6), clients, seed=6)
    assert [set(other.chosen(n).tolist()) for n in range(6)] != rounds[:6]
    first_steps = plan.round(8).first_steps
    assert (first_steps == 2).all()  # each has made one round before


@pytest.mark.quick
def test_a_client_without_rows_does_not_move_others() -> None:
    ids = np.arange(9)
    federated = averaging(ids)
    clients = of.of_ids(ids, 9, Devices(1), is_local=False)
    assert clients is not None
    fewer = of.Clients(np.where(ids == 4, 0, 1), clients.workers, clients.members, "id")
    both = [
        RoundPlan(federated, some, Devices(1).place, Sequential(), 16, 5)
        for some in (clients, fewer)
    ]
    for number in range(3):
        all_of, some_of = (set(plan.chosen(number).tolist()) for plan in both)
        assert all_of - {4} == some_of


def test_without_noise_it_is_a_loop_in_turns() -> None:
    federated = averaging(noise_multiplier=0.0)
    plan = plan_of(federated, IDS)
    drawn = [plan.chosen(number).tolist() for number in range(4)]
    assert all(len(clients) == 2 for clients in drawn)
    with in_float64():
        ours, theirs = (model_of(keras.optimizers.SGD(0.3)) for _ in range(2))
        tfdist.fit(ours, X, Y, epochs=4, federated=federated, **OPTIONS)
        federated_averaging(
            theirs, PARTS, 4, optimizer=lambda: keras.optimizers.SGD(0.3), batch_size=16,
            local_steps=2, chosen=drawn.__getitem__, clip=(0.2, 6 / 3),
        )  # fmt: skip
    for a, b in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_rounds_subtract_noise_of_rounds_before() -> None:
    """Undone by the inverse matrix, the noise is independent and of the right deviation."""
    model = keras.Sequential([keras.Input((40,)), keras.layers.Dense(200, use_bias=False)])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    weights = [model.get_weights()[0]]
    keep = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: weights.append(model.get_weights()[0])
    )
    ids = np.arange(30) // 3
    x, y = np.zeros((30, 40), "float32"), np.zeros((30, 200), "float32")
    federated = averaging(ids, l2_norm_clip=0.7, noise_multiplier=1.5, turns=2)
    report = tfdist.fit(
        model, x, y, epochs=6, verbose=0, federated=federated, callbacks=[keep]
    ).privacy
    moved = -np.diff(np.array(weights), axis=0).reshape(6, -1) * (10 / 2)
    squares = sum(f**2 for f in FACTORS)
    products = sum(a * b for a, b in itertools.pairwise(FACTORS))
    found = np.corrcoef(moved[4:])[0, 1]
    assert found == pytest.approx(products / squares, abs=5 / math.sqrt(8000))
    z = np.linalg.inv(mixing(6, FACTORS)) @ moved / (1.5 * 0.7)
    assert abs(float((z**2).sum()) - z.size) < 5 * math.sqrt(2 * z.size)
    assert np.abs(np.corrcoef(z)[np.triu_indices(6, 1)]).max() < 5.5 / math.sqrt(8000)
    assert report.secret
    assert report.ledger.steps == 6


@pytest.mark.full
def test_a_stopped_training_goes_on_with_its_noise_and_turns(tmp_path: Any) -> None:
    def trained(*callbacks: Any, noise: int | None = 7, **options: Any) -> Any:
        model = model_of(keras.optimizers.SGD(0.1))
        options = {**OPTIONS, "epochs": 5, "callbacks": list(callbacks), **options}
        return model, tfdist.fit(
            model, X, Y, federated=averaging(seed=noise), **options
        ).privacy

    expected, _ = trained()
    with pytest.raises(StoppedError):
        trained(Stop(3), checkpoint=tmp_path / "a")
    with pytest.raises((ArgumentError, CheckpointError)):  # clients would come too early
        trained(checkpoint=tmp_path / "a", seed=6)
    ours, report = trained(checkpoint=tmp_path / "a")
    for a, b in zip(ours.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert report.ledger.steps == 5
    with pytest.raises(StoppedError):  # without a seed: the checkpoint keeps the turns
        trained(Stop(3), checkpoint=tmp_path / "b", seed=None, noise=None)
    _, report = trained(checkpoint=tmp_path / "b", seed=None, noise=None)
    assert report.secret
    # The third round was lost, and counts: who saw it also sees what came in its place.
    assert report.ledger.steps == 6
    whole = Phase(1.0, 4.0, 5, num_rows=6, unit="client", bands=4, separation=3)
    lost = dataclasses.replace(whole, steps=1, after=2)
    expected = Ledger((whole, lost)).epsilon(1e-2, relation="replace_special")
    assert report.epsilon == pytest.approx(expected, rel=1e-9)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"relation": "add_or_remove_one"}, "relation"),
        ({"sampling_probability": 0.5}, "`turns`"),
        ({"target_quantile": 0.5}, "target_quantile"),
        ({"turns": 0}, "turns"),
        ({"bands": 0}, "bands"),
    ],
)
def test_what_correlated_noise_does_not_cover_is_refused(settings: Any, match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        averaging(**settings)
