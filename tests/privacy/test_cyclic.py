"""Correlated noise with groups that take turns: DPSGD(bands=)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import dp_accounting as dp
import keras
import numpy as np
import pytest

import tfdist
from tests.privacy.test_counting import NUMBERS, Watch, still, train
from tests.privacy.test_groups import classifier, loop, rows
from tfdist.errors import ArgumentError
from tfdist.privacy import Ledger, Phase, Poisson
from tfdist.privacy.accounting.correlated import banded, banded_norm, inverse
from tfdist.privacy.sampling.cyclic import CyclicPoisson


def sgd(bands: int = 4, noise: float = 1.0, **options: Any) -> tfdist.DPSGD:
    given = {"delta": 1e-3, "accountant": "rdp", **options}
    return tfdist.DPSGD(1.0, noise_multiplier=noise, bands=bands, **given)


def matrix(bands: int, steps: int) -> Any:
    return sum(f * np.eye(steps, k=-lag) for lag, f in enumerate(banded(bands)))


# --- what it costs ----------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("bands", [1, 2, 5, 16])
def test_what_the_theorem_assumes_of_the_matrix(bands: int) -> None:
    steps = 60
    c = matrix(bands, steps)
    assert (np.triu(c, 1) == 0).all()
    assert (np.tril(c, -bands) == 0).all()
    np.testing.assert_allclose(np.linalg.norm(c, axis=0).max(), banded_norm(bands), rtol=1e-12)
    for first in range(bands):  # of a group's steps no two move the same row
        assert ((c[:, first::bands] != 0).sum(1) <= 1).all()
    np.testing.assert_allclose(np.linalg.inv(c)[:, 0], inverse(banded(bands), steps), atol=1e-9)
    series = banded(12)
    np.testing.assert_allclose(np.convolve(series, series)[:12], np.ones(12))  # 1 / (1 - x)


@pytest.mark.quick
@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_special"])
def test_epsilon_is_that_of_a_groups_steps(accountant: str, relation: str) -> None:
    phase = Phase(0.1, 2.0, 42, None, 1000, bands=4, cyclic=True)
    which = dp.NeighboringRelation[relation.upper()]
    theirs = dp.rdp.RdpAccountant(neighboring_relation=which)
    if accountant == "pld":
        theirs = dp.pld.PLDAccountant(which, 1e-4)
    noise = 2.0 / np.linalg.norm(matrix(4, 9)[:, 0])
    theirs.compose(dp.PoissonSampledDpEvent(0.1, dp.GaussianDpEvent(noise)), 11)  # 42 / 4 up
    found = Ledger((phase,)).epsilon(1e-5, accountant=accountant, relation=relation)
    assert found == pytest.approx(theirs.get_epsilon(1e-5), rel=1e-3)
    # Independent noise is DP-SGD; two trainings are two mechanisms, however short.
    options = {"accountant": accountant, "relation": relation}
    plain, alone = (Phase(0.1, 2.0, 42, **more) for more in ({}, {"bands": 1, "cyclic": True}))
    assert Ledger((alone,)).epsilon(1e-5, **options) == Ledger((plain,)).epsilon(
        1e-5, **options
    )
    short = Phase(0.1, 2.0, 1, bands=4, cyclic=True)
    twice = Ledger().add(short).add(short)
    assert len(twice.phases) == 2
    assert twice.epsilon(1e-5, **options) > Ledger((short,)).epsilon(1e-5, **options)
    assert Ledger.from_dict(twice.to_dict()) == twice


@pytest.mark.quick
def test_delta_is_the_mechanisms_own() -> None:
    """Outputs of a small training with the example, weighed against those without it."""
    bands, steps, q, noise, epsilon = 2, 5, 0.5, 1.3, 0.8
    rng, c = np.random.default_rng(0), matrix(bands, steps)[:, ::bands]  # a group's columns
    coins = rng.random((400_000, c.shape[1])) < q
    seen = coins @ c.T + noise * rng.normal(size=(len(coins), steps))
    exponents = (seen @ c - (c**2).sum(0) / 2) / noise**2
    loss = np.log1p(q * np.expm1(exponents)).sum(1)
    gains = np.maximum(0.0, -np.expm1(epsilon - loss))
    delta, error = gains.mean(), gains.std() / math.sqrt(len(gains))
    phase = Phase(q, noise, steps, bands=bands, cyclic=True)
    # The last column is cut off, and counted as if it were not.
    assert Ledger((phase,)).epsilon(delta - 4 * error) >= epsilon
    whole = Phase(q, noise, steps - 1, bands=bands, cyclic=True)
    assert Ledger((whole,)).epsilon(delta) < epsilon


@pytest.mark.quick
def test_wrong_settings_are_refused() -> None:
    for wrong in ({"bands": 0}, {"group_ids": [1]}, {"target_quantile": 0.5}):
        with pytest.raises(ArgumentError, match=next(iter(wrong))):
            sgd(**wrong)
    with pytest.raises(ArgumentError, match="must be numbers with `bands`"):
        tfdist.DPSGD(1.0, lambda step: 1.0, delta=1e-3, bands=2)
    for more in ({}, {"bands": 2, "separation": 3}, {"bands": 2, "after": 3}):
        with pytest.raises(ArgumentError, match="`cyclic` must be given with"):
            Phase(0.5, 1.0, 5, cyclic=True, **more)
    with pytest.raises(ArgumentError, match="`sampler` must be None with `bands`"):
        train(still(), privacy=sgd(), sampler=Poisson())


# --- sampling ---------------------------------------------------------------------------


@pytest.mark.quick
def test_groups_take_turns() -> None:
    groups, steps, options = 4, 4000, {"num_rows": 600, "batch_size": 30}
    sampler = CyclicPoisson(groups)
    drawn = np.zeros((steps, 600), bool)
    for step in range(steps):
        found = sampler.rows(step, seed=3, **options)
        drawn[step, found] = True
        assert len(found) == drawn[step].sum()
    group = np.array([drawn[turn::groups].any(0) for turn in range(groups)])
    assert (group.sum(0) == 1).all()  # each row in one group
    assert 100 < group.sum(1).min() <= group.sum(1).max() < 200
    rates = drawn.sum(0) / (steps / groups)
    assert sampler.phase(steps=1, noise_multiplier=1.0, **options).sampling_probability == 0.2
    deviation = math.sqrt(0.2 * 0.8 / (steps / groups))
    assert np.abs(rates - 0.2).max() < 5 * deviation
    assert rates.std() == pytest.approx(deviation, rel=0.15)
    assert drawn.sum(1).mean() == pytest.approx(30, rel=0.02)
    own = drawn[0::groups][:, group[0]]
    correlation = np.corrcoef(own[:-1].ravel(), own[1:].ravel())[0, 1]
    assert abs(correlation) < 5 / math.sqrt(own.size)
    other = sampler.rows(0, seed=4, **options)
    assert set(other) - set(np.flatnonzero(group[0]))  # another seed, other groups
    every = CyclicPoisson(4).rows(9, num_rows=20, batch_size=10, seed=3)
    assert CyclicPoisson(4).expected_rows(20, 10) == 5
    assert len(every) == len(CyclicPoisson(4).rows(1, num_rows=20, batch_size=10, seed=3))


# --- training ---------------------------------------------------------------------------


def test_noise_is_the_inverse_of_the_matrix_times_independent_noise() -> None:
    model, watch = still(), Watch()
    for _ in range(2):  # each `fit` begins anew
        report = train(model, steps=20, privacy=sgd(noise=1.5), callbacks=[watch]).privacy
    for added in np.split(np.array(watch.added), 2):
        own = matrix(4, 20) @ added / 1.5
        np.testing.assert_allclose(own.std(1), 1.0, rtol=5 / math.sqrt(2 * NUMBERS))
        correlation = np.corrcoef(own)[np.triu_indices(20, 1)]
        assert np.abs(correlation).max() < 5 / math.sqrt(NUMBERS)
    assert [(p.steps, p.bands, p.cyclic) for p in report.ledger.phases] == [(20, 4, True)] * 2
    theirs = dp.rdp.RdpAccountant()
    event = dp.GaussianDpEvent(1.5 / np.linalg.norm(matrix(4, 9)[:, 0]))
    theirs.compose(dp.PoissonSampledDpEvent(1.0, event), 10)  # 4 * 5 of 20 rows: a whole group
    assert report.epsilon == pytest.approx(theirs.get_epsilon(1e-3), rel=1e-3)
    assert "each example in one of 4 groups that take turns" in report.statement()
    model.compile(tfdist.privacy.DPAdam(0.01), "mse", steps_per_execution=2)
    told: list[float] = []
    ask = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: told.append(model.optimizer.noise_deviation())
    )
    train(model, steps=8, privacy=sgd(noise=1.5), callbacks=[ask])
    deviation = 1.5 * np.linalg.norm(np.linalg.inv(matrix(4, 64))[:, 0]) / 5
    assert told[-1] == pytest.approx(deviation, rel=1e-3)


def test_clipped_gradients_of_a_group_are_summed() -> None:
    layers = keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(3)
    model = classifier(*layers, optimizer=keras.optimizers.SGD(1.0))
    x, y, _ = rows()
    before = model.get_weights()
    privacy = tfdist.DPSGD(0.5, noise_multiplier=0.0, delta=1e-3, bands=3)
    drawn = CyclicPoisson(3).rows(0, num_rows=len(x), batch_size=10, seed=8)
    assert len(drawn) > 3
    sums, _ = loop(model, x, y, 0.5, [[int(row)] for row in drawn])
    tfdist.fit(
        model, x, y, batch_size=10, steps_per_epoch=1, verbose=0, seed=8, privacy=privacy
    )
    for old, new, total in zip(before, model.get_weights(), sums, strict=True):
        np.testing.assert_allclose(old - new, total / 10, atol=1e-5)


def test_a_training_that_was_killed_begins_a_new_mechanism(tmp_path: Path) -> None:
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    one, other = Watch((17, disk, copy)), Watch()
    privacy = sgd(target_epsilon=3.0, noise=None)  # type: ignore[arg-type]
    saver = tfdist.Checkpoint(disk, every=10)
    train(still(), steps=40, privacy=privacy, checkpoint=saver, callbacks=[one])
    saver = tfdist.Checkpoint(copy, every=10)
    report = train(
        still(), steps=40, privacy=privacy, checkpoint=saver, callbacks=[other]
    ).privacy
    after = np.array(other.added[10:])
    lost, made = report.ledger.phases
    assert 17 <= lost.steps <= 18
    assert made.steps == len(after)
    assert 2.5 < report.epsilon <= 3.0
    assert lost.noise_multiplier == made.noise_multiplier
    assert lost.run_id != made.run_id  # or files of both would be taken for one mechanism
    # Nothing is taken back of what the first process has added, and nothing is the same.
    own = matrix(4, len(after)) @ after / made.noise_multiplier
    np.testing.assert_allclose(own.std(1), 1.0, rtol=5 / math.sqrt(2 * NUMBERS))
    joint = np.corrcoef(np.array(one.added[6:14]), after[:8])[:8, 8:]
    assert np.abs(joint).max() < 5 / math.sqrt(NUMBERS)
