"""Clients that each make steps of DP-SGD: their noise, their steps, and the largest epsilon."""

from __future__ import annotations

import math
from typing import Any

import dp_accounting as dp
import keras
import numpy as np
import pytest
import tensorflow as tf

import tfdist
from tests.behaviour.checkpoint_checks import Stop, StoppedError
from tests.federated.reference import (
    clipped_by_example,
    in_float64,
    model_of,
    rows_drawn,
    rows_of,
)
from tests.strategies.devices import Devices
from tfdist.errors import ArgumentError
from tfdist.federated import clients as of
from tfdist.federated.plan import RoundPlan
from tfdist.privacy import Ledger, Phase
from tfdist.privacy.audit_scores.tradeoffs import curve_of_ledger
from tfdist.privacy.sampling.poisson import Poisson

SIZES = (40, 7, 70, 1)
PARTS = rows_of(*SIZES)
X, Y = (np.concatenate(arrays) for arrays in zip(*PARTS, strict=True))
IDS = np.repeat(range(len(SIZES)), SIZES)
OPTIONS: dict[str, Any] = {"batch_size": 16, "seed": 5, "verbose": 0}


def averaging(**settings: Any) -> Any:
    """Two private local steps of each client."""
    own = ("clients", "server_optimizer", "local_steps", "proximal", "keep_optimizer")
    rest = {name: settings.pop(name) for name in own if name in settings}
    privacy = tfdist.DPSGD(**{
        "l2_norm_clip": 0.2, "noise_multiplier": 1.0, "delta": 1e-3, **settings,
    })  # fmt: skip
    return tfdist.FedAvg(**{"clients": IDS, "local_steps": 2, "privacy": privacy, **rest})


def exact(noise: float, q: float, steps: int, delta: float = 1e-3) -> float:
    """Epsilon by dp-accounting, for one client alone."""
    accountant = dp.pld.PLDAccountant(value_discretization_interval=1e-4)
    step = dp.PoissonSampledDpEvent(q, dp.GaussianDpEvent(noise))
    return float(accountant.compose(dp.SelfComposedDpEvent(step, steps)).get_epsilon(delta))


def of_silos(*steps: tuple[float, float, int], **others: Any) -> Ledger:
    """The ledger of clients, each with a probability, noise and a number of steps."""
    phases = [
        Phase(q, z, n, num_rows=100 + part, part=part, run_id="a", **others)
        for part, (q, z, n) in enumerate(steps)
    ]
    return Ledger(tuple(phases))


# --- the accounting ---------------------------------------------------------------------------


def cost(ledger: Ledger) -> float:
    return ledger.epsilon(1e-3, coarse=True)


@pytest.mark.quick
def test_epsilon_is_the_largest_of_the_clients():
    ledger = of_silos((0.1, 1.0, 5), (0.3, 1.0, 5), (0.05, 1.0, 40), (0.3, 2.0, 5))
    each = [cost(ledger.of_part(part)) for part in ledger.parts]
    oracle = [exact(1.0, 0.3, 5), exact(1.0, 0.05, 40)]
    assert each[1:3] == pytest.approx(oracle, rel=3e-2)
    assert cost(ledger) == max(each) == each[1]
    together = tuple(Phase(0.3, 1.0, 5) for _ in ledger.parts)  # of the same examples
    assert cost(ledger) < cost(Ledger(together))
    assert ledger.steps == 40
    # The first client is not looked at: it draws less often than the second one.
    assert [set(one.parts) for one in ledger.dearest()] == [{1}, {2}, {3}]


@pytest.mark.quick
def test_steps_on_all_examples_are_steps_of_each_client():
    before = Ledger((Phase(0.2, 1.5, 3),))
    ledger = before.merged(of_silos((0.1, 1.0, 5), (0.3, 1.0, 5)))
    accountant = dp.pld.PLDAccountant(value_discretization_interval=1e-3)
    for noise, q, steps in ((1.0, 0.3, 5), (1.5, 0.2, 3)):
        step = dp.PoissonSampledDpEvent(q, dp.GaussianDpEvent(noise))
        accountant.compose(dp.SelfComposedDpEvent(step, steps))
    assert cost(ledger) == pytest.approx(accountant.get_epsilon(1e-3), rel=3e-2)
    assert ledger.steps == 8
    # Another client may be the worst one of a second training.
    more = [Phase(q, 0.8, 5, part=part) for part, q in enumerate((0.3, 0.01))]
    later = ledger.merged(Ledger(tuple(more)))
    assert cost(later) == cost(later.of_part(0)) > cost(later.of_part(1))


@pytest.mark.quick
def test_steps_of_clients_are_merged_by_client():
    ledger, more = of_silos((0.1, 1.0, 50), (0.3, 1.0, 50)), of_silos((0.1, 1.0, 70))
    merged = ledger.merged(more)
    assert [(p.part, p.steps) for p in merged.phases] == [(0, 70), (1, 50)]
    assert Ledger.from_dict(merged.to_dict()) == merged
    assert merged.merged(ledger) == merged
    without = of_silos((0.1, 0.0, 1), (0.3, 1.0, 50))
    assert math.isinf(cost(without))
    with pytest.raises(ArgumentError, match="same `clients`"):
        Ledger((*ledger.phases, Phase(0.1, 1.0, 5, num_rows=7, part=0))).epsilon(1e-3)
    with pytest.raises(ArgumentError, match="part=3"):
        Phase(0.1, 1.0, 5, unit="user", part=3)


@pytest.mark.quick
def test_many_clients_cost_the_time_of_few():
    ledger = of_silos(*[(0.001 * (1 + n % 700), 1.0, 20) for n in range(2000)])
    assert [one.parts for one in ledger.dearest()] == [(699,)]


@pytest.mark.quick
def test_an_audit_tests_the_claim_for_the_worst_client():
    both = of_silos((0.1, 1.0, 5), (0.3, 1.0, 5))
    y = np.linspace(0.0, 1.0, 11)
    expected = curve_of_ledger(both.of_part(1))(y)
    np.testing.assert_array_equal(curve_of_ledger(both)(y), expected)


# --- training ---------------------------------------------------------------------------------


def test_one_client_is_plain_private_training():
    """The same draws and the same noise, bit by bit, over rounds and with an optimizer kept."""

    def trained(epochs: int, **options: Any) -> Any:
        model = model_of(keras.optimizers.SGD(0.3, momentum=0.9))
        return model, tfdist.fit(model, X, Y, epochs=epochs, **OPTIONS, **options)

    privacy = tfdist.DPSGD(0.2, noise_multiplier=1.1, delta=1e-3, seed=5)
    plain, theirs = trained(1, privacy=privacy)
    assert theirs.privacy.ledger.steps == 8
    one = tfdist.FedAvg(
        local_steps=2, clients=np.zeros(len(X), int), keep_optimizer=True, privacy=privacy
    )
    federated, ours = trained(4, federated=one)
    for a, b in zip(federated.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert ours.privacy.epsilon == theirs.privacy.epsilon
    assert ours.privacy.ledger.steps == 8
    assert int(federated.optimizer.iterations) == 8


def test_without_noise_it_is_a_loop_that_clips_examples():
    """Each client draws its own rows; clients with few rows have empty batches."""
    federated = averaging(noise_multiplier=0.0, proximal=0.5)
    drawn = rows_drawn(federated, IDS, SIZES, seed=5)
    sizes = [len(rows) for n in range(3) for rows in drawn(n, 0)]
    assert len(set(sizes)) > 1
    with in_float64():
        ours, theirs = (model_of(keras.optimizers.SGD(0.3)) for _ in range(2))
        history = tfdist.fit(ours, X, Y, epochs=3, federated=federated, **OPTIONS)
        clipped_by_example(theirs, PARTS, 3, drawn=drawn, clip=0.2, batch_size=16, proximal=0.5)
    for a, b in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)  # norms are rounded up by 1e-6
    assert math.isinf(history.privacy.epsilon)


def test_each_client_adds_all_noise_of_its_own():
    """Independent noise of four clients, in two steps each, on weights that are averaged."""
    model = keras.Sequential([keras.Input((40,)), keras.layers.Dense(200, use_bias=False)])
    model.compile(keras.optimizers.SGD(1.0), "mse")
    weights = [model.get_weights()[0]]
    keep = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: weights.append(model.get_weights()[0])
    )
    x, y = np.zeros((24, 40), "float32"), np.zeros((24, 200), "float32")
    federated = averaging(
        clients=np.arange(24) % 4, l2_norm_clip=0.7, noise_multiplier=1.5, local_steps=2
    )
    report = tfdist.fit(
        model, x, y, batch_size=3, epochs=4, verbose=0, federated=federated, callbacks=[keep]
    ).privacy
    moved = np.diff(np.array(weights), axis=0).reshape(4, -1)
    # The mean of four clients, each with the sum of two steps; shared noise would have twice
    # the deviation, and a fourth of the noise on each client half of it.
    deviation = 1.5 * 0.7 / 3 * math.sqrt(2 / 4)
    square = float(((moved / deviation) ** 2).sum())
    assert abs(square - moved.size) < 5 * math.sqrt(2 * moved.size)
    assert np.abs(np.corrcoef(moved)[np.triu_indices(4, 1)]).max() < 5.5 / math.sqrt(8000)
    assert report.secret


def test_steps_are_counted_for_each_client():
    model = model_of(keras.optimizers.SGD(0.1))
    report = tfdist.fit(model, X, Y, epochs=3, federated=averaging(), **OPTIONS).privacy
    assert [(p.part, p.steps, p.num_rows) for p in report.ledger.phases] == [
        (part, 6, size) for part, size in enumerate(SIZES)
    ]
    each = [cost(report.ledger.of_part(part)) for part in range(4)]
    oracle = [exact(1.0, min(1.0, 16 / size), 6) for size in SIZES[:2]]
    assert each[:2] == pytest.approx(oracle, rel=3e-2)
    assert each[0] > each[2]
    assert max(each) == each[1] == each[3]
    assert report.epsilon == pytest.approx(each[1], rel=1e-6)
    assert "in 6 steps of a client, the largest of 4 clients" in report.line()
    assert "the client with the largest epsilon of 4" in report.statement()
    assert "differ by one example, added or removed" in report.statement()
    assert "delta is not below" not in report.statement()
    target = averaging(noise_multiplier=None, target_epsilon=20.0)
    report = tfdist.fit(model, X, Y, epochs=2, verbose=0, federated=target).privacy
    assert report.ledger.steps == 10  # with those before
    assert 19.5 < report.epsilon <= 20.0
    with pytest.raises(ArgumentError, match="same `clients`"):
        tfdist.fit(model, X, Y, verbose=0, federated=averaging(clients=IDS[::-1]))


@pytest.mark.full
def test_a_stopped_training_goes_on_and_counts_the_steps_of_all_clients(tmp_path):
    """With a known seed bit by bit; with secret ones, steps that were lost count too."""

    def trained(*callbacks: Any, **options: Any) -> Any:
        model = model_of(keras.optimizers.SGD(0.1, momentum=0.9))
        federated = averaging(keep_optimizer=True, seed=options.get("seed", 5))
        options = {**OPTIONS, "epochs": 4, "callbacks": list(callbacks), **options}
        return model, tfdist.fit(model, X, Y, federated=federated, **options).privacy

    expected, _ = trained()
    known, secret = tmp_path / "known", tmp_path / "secret"
    with pytest.raises(StoppedError):
        trained(Stop(2), checkpoint=known)
    ours, report = trained(checkpoint=known)
    for a, b in zip(ours.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert report.ledger.steps == 8
    every = tfdist.Checkpoint(secret, every=2)
    with pytest.raises(StoppedError):
        trained(Stop(3), checkpoint=every, seed=None)  # the third round is lost
    _, report = trained(checkpoint=every, seed=None)
    assert [sum(p.steps for p in report.ledger.phases if p.part == n) for n in range(4)] == (
        [10] * 4
    )
    assert report.ledger.steps == 10
    assert report.secret


@pytest.mark.full
def test_a_budget_ends_training_before_any_client_exceeds_it():
    model = model_of(keras.optimizers.SGD(0.1))
    budget = tfdist.PrivacyBudget(4.0)
    federated = averaging(noise_multiplier=4.0)
    history = tfdist.fit(
        model, X, Y, epochs=50, verbose=0, federated=federated, callbacks=[budget]
    )
    assert 3.5 < history.privacy.epsilon <= 4.0
    assert history.privacy.ledger.steps == 2 * len(history.epoch) < 100


class Mixes(keras.layers.Layer):
    """Subtracts the mean of a batch once the weights have moved."""

    def build(self, shape: Any) -> None:
        self.moved = self.add_weight(shape=(), initializer="zeros")

    def call(self, x: Any) -> Any:
        mean = tf.reduce_mean(x, 0, keepdims=True)
        return x - tf.where(tf.abs(self.moved) > 0.01, mean, 0.0) + self.moved


@pytest.mark.full
def test_examples_that_mix_later_end_the_training():
    model = keras.Sequential([keras.Input((6,)), Mixes(), keras.layers.Dense(3)])
    model.compile(keras.optimizers.SGD(5.0), "mse")
    federated, x = averaging(l2_norm_clip=1.0, local_steps=16), X.astype("float32")
    with pytest.raises(ArgumentError, match="mix the examples"):
        tfdist.fit(model, x, np.eye(3)[Y], epochs=2, federated=federated, **OPTIONS)


SILO = tfdist.DPSGD(1.0, noise_multiplier=1.0, delta=1e-3)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"local_steps": None}, "local_steps=None"),
        ({"clients_per_round": 2}, "clients_per_round=2"),
        ({"privacy": 3}, "tfdist.DPSGD or None"),
    ],
)
def test_settings_that_are_not_counted_are_refused(settings, match):
    with pytest.raises(ArgumentError, match=match):
        tfdist.FedAvg(**{"local_steps": 1, "privacy": SILO, **settings})


@pytest.mark.parametrize(
    ("settings", "options", "match"),
    [
        ({"target_quantile": 0.5}, {}, "target_quantile"),
        ({"group_ids": IDS}, {}, "group_ids"),
        ({"bands": 4}, {}, "bands"),
        ({"augmentations": 2}, {}, "augmentations"),
        ({"l2_norm_clip": lambda step: 1.0}, {}, "schedule"),
        ({"clients": None}, {}, "FedAvg without `clients`"),
        ({}, {"privacy": SILO}, "not both at once"),
        ({}, {"sampler": tfdist.samplers.Sequential()}, "`sampler` must be None"),
        ({}, {"class_weight": "balanced"}, "class_weight"),
        ({}, {"callbacks": [keras.callbacks.EarlyStopping("loss")]}, "EarlyStopping"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_what_is_not_counted_is_refused_before_training(settings, options, match):
    model = model_of(keras.optimizers.SGD(0.1))
    with pytest.raises(ArgumentError, match=match):
        tfdist.fit(model, X, Y, federated=averaging(**settings), **{**OPTIONS, **options})
    ftrl = tfdist.DPFTRL(1.0, noise_multiplier=1.0, delta=1e-3)
    federated = tfdist.FedAvg(local_steps=1, clients=IDS, privacy=ftrl)
    with pytest.raises(ArgumentError, match="DPFTRL"):
        tfdist.fit(model, X, Y, federated=federated, **OPTIONS)


def test_workers_and_clients_draw_with_seeds_of_their_own():
    """Whoever knows the seed that all workers share cannot tell which rows were drawn."""
    clients = of.of_ids(IDS, len(IDS), Devices(1), is_local=False)
    sampler = Poisson(capacity=len(X))
    federated = averaging()
    one, two = (
        RoundPlan(federated, clients, Devices(1).place, sampler, 16, 5, s) for s in (1, 2)
    )
    rows = [[plan._batches(0, n, 1)[0].tolist() for n in range(5)] for plan in (one, two)]
    assert rows[0] != rows[1]
    assert (one.round(3).check == two.round(3).check).all()
