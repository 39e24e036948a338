"""Schedules of noise and norms: what a step gets, and what all steps cost."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dp_accounting as dp
import keras
import numpy as np
import pytest
import tensorflow as tf

import tfdist
from tests.privacy.test_counting import NUMBERS, Watch, still, train
from tfdist.errors import ArgumentError
from tfdist.privacy import validation
from tfdist.privacy.accounting.dp_sgd import noise_for
from tfdist.privacy.accounting.ledger import Ledger, Phase
from tfdist.privacy.schedules import MOST_LEVELS, StepSchedule, schedule_of

S = keras.optimizers.schedules
FALLING = S.PiecewiseConstantDecay([3, 13], [4.0, 2.0, 1.0])  # 4 and 10 steps, then the rest


def sgd(noise: Any = FALLING, clip: Any = 1.0, **options: Any) -> tfdist.DPSGD:
    given = {"delta": 1e-3, "accountant": "rdp", **options}  # the quick one
    return tfdist.DPSGD(clip, noise_multiplier=noise, **given)


def falling(step: int) -> float:
    """FALLING by hand; Keras's boundaries belong to the value before."""
    return 4.0 if step <= 3 else 2.0 if step <= 13 else 1.0


def composed(noises: Any, probability: float = 0.25) -> float:
    """Composes steps one by one, by dp-accounting alone."""
    accountant = dp.rdp.RdpAccountant()
    for noise in noises:
        event = dp.PoissonSampledDpEvent(probability, dp.GaussianDpEvent(noise))
        accountant.compose(event)
    return float(accountant.get_epsilon(1e-3))


def by_noise(report: Any) -> dict[float, int]:
    found = Counter[float]()
    for phase in report.ledger.phases:
        found[phase.noise_multiplier] += phase.steps
    return dict(found)


def deviations(added: Any) -> Any:
    return np.std(np.array(added), axis=1)


# --- the plan ---------------------------------------------------------------------------


@pytest.mark.quick
def test_a_plan_is_the_function_at_each_step() -> None:
    falls = S.ExponentialDecay(0.7, 5, 0.5)
    for noise, by_hand in ((FALLING, falling), (falling, falling)):
        plan = schedule_of(sgd(noise, falls), 40)
        assert plan is not None
        for step in range(45):  # behind the last one it stays as it is
            now, last = plan.at(tf.constant(step, tf.int64)), min(step, 39)
            norm = 0.7 * 0.5 ** (last / 5)
            assert float(now.norm) == pytest.approx(norm, rel=1e-6)
            assert float(now.unit) == pytest.approx(norm * by_hand(last), rel=1e-6)
        assert plan.counts(0, 40) == {4.0: 4, 2.0: 10, 1.0: 26}
        assert plan.counts(2, 3) == {4.0: 2, 2.0: 1}
        assert plan.counts(38, 10) == {1.0: 10}
        assert plan.counts(7, 0) == {}
    again = StepSchedule((0, 2, 4), (1.0, 3.0, 1.0), (1.0, 1.0, 1.0))
    assert again.counts(0, 9) == {1.0: 7, 3.0: 2}
    assert schedule_of(sgd(2.0), 40) is None


@pytest.mark.quick
def test_many_values_are_rounded_to_less_noise() -> None:
    falls = S.CosineDecay(5.0, 1000, alpha=0.2)
    plan = schedule_of(sgd(falls), 1000)
    assert plan is not None
    rounded = np.repeat(plan.multipliers, np.diff([*plan.begins, 1000]))
    wanted = np.array([1.0 + 4.0 * (1 + math.cos(math.pi * t / 1000)) / 2 for t in range(1000)])
    assert len(set(plan.multipliers)) <= MOST_LEVELS
    assert (rounded <= wanted * (1 + 1e-6)).all()
    assert (rounded >= wanted * 5 ** (-1 / (MOST_LEVELS - 1)) * (1 - 1e-6)).all()


@pytest.mark.quick
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise": lambda step: 1.0 - step / 10}, "`noise_multiplier` must be a number above"),
        ({"noise": lambda step: math.inf}, "must return finite numbers"),
        ({"noise": lambda step: "much"}, "must return a number for the number"),
        (
            {"noise": lambda step: np.random.uniform(1, 2)},
            "must return the same number for the same",
        ),
        ({"clip": lambda step: 10.0 ** (5 - step)}, "`l2_norm_clip` must be a number between"),
        ({"noise": 1.0, "clip": keras.optimizers.schedules.LearningRateSchedule()}, "raised"),
    ],
)
def test_what_is_no_schedule_is_refused(settings: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        schedule_of(sgd(**settings), 40)


@pytest.mark.quick
def test_what_follows_the_data_is_refused() -> None:
    loss = keras.Variable(1.0)
    with pytest.raises(ArgumentError, match="reads variables"):
        schedule_of(sgd(lambda step: 1.0 + loss), 40)
    with pytest.raises(ArgumentError, match="must be None with a schedule"):
        sgd(target_quantile=0.5)
    for settings in ({"noise_multiplier": FALLING}, {"noise_multiplier": 1.0}):
        clip = 1.0 if callable(settings["noise_multiplier"]) else FALLING
        with pytest.raises(ArgumentError, match="must be numbers with DPFTRL"):
            tfdist.DPFTRL(clip, delta=1e-3, **settings)  # type: ignore[arg-type]
    elastic = SimpleNamespace(strategy=SimpleNamespace(elastic=True))
    for alike in (sgd(), sgd(2.0, bands=2)):
        with pytest.raises(ArgumentError, match="must be alike in an elastic run"):
            validation.check_data(elastic, np.ones(3), None, None, alike)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="Exactly one of"):
        sgd(2.0, target_epsilon=1.0)


# --- what it costs ----------------------------------------------------------------------


@pytest.mark.quick
def test_a_factor_is_found_for_a_target() -> None:
    phases = [Phase(0.01, noise, 100) for noise in (1.0, 1.5, 2.0, 2.5, 3.0)]
    options = {"accountant": "pld", "relation": "add_or_remove_one", "spent": Ledger()}
    factor = noise_for(phases, 1.0, 1e-5, **options)  # type: ignore[arg-type]

    def spent(factor: float) -> float:
        accountant = dp.pld.PLDAccountant(value_discretization_interval=1e-3)
        for phase in phases:
            gaussian = dp.GaussianDpEvent(factor * phase.noise_multiplier)
            accountant.compose(dp.PoissonSampledDpEvent(0.01, gaussian), phase.steps)
        return float(accountant.get_epsilon(1e-5))

    assert spent(factor) <= 1.001 < spent(0.985 * factor)


def test_each_step_is_accounted_by_its_noise() -> None:
    model, clip = still(), S.ExponentialDecay(0.5, 10, 0.5)
    model.compile(tfdist.privacy.DPAdam(0.0), "mse")
    moments: list[float] = []
    keep = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: moments.append(
            float(model.optimizer._noise_moments[0].value)
        )
    )
    train(model, steps=20, privacy=sgd(clip=clip), callbacks=[keep])
    # What Adam is told of a step's noise is what it has.
    told = np.sqrt((np.array(moments[1:]) - 0.999 * np.array(moments[:-1])) / 0.001)
    right = [falling(t) * 0.5 * 0.5 ** (t / 10) / 5 for t in range(1, 20)]
    np.testing.assert_allclose(told, right, rtol=1e-2)
    model.steps_per_execution = 2
    report = train(model, steps=20, privacy=sgd(clip=clip)).privacy  # which begins anew
    assert [(p.noise_multiplier, p.steps) for p in report.ledger.phases] == [
        (4.0, 4), (2.0, 10), (1.0, 6), (4.0, 4), (2.0, 10), (1.0, 6),
    ]  # fmt: skip
    truth = composed([falling(step) for step in range(20)] * 2)
    assert report.epsilon == pytest.approx(truth, rel=1e-6)
    text = report.statement()
    assert "from 40 steps of DP-SGD" in text
    assert "of standard deviation 1 to 4 C, 3 values in all, added" in text
    assert "The norm C followed a schedule" in text


def test_noise_and_norm_are_the_schedules() -> None:
    watch, clip = Watch(), S.ExponentialDecay(0.5, 10, 0.5)
    train(still(), steps=20, privacy=sgd(clip=clip), callbacks=[watch])
    right = [falling(t) * 0.5 * 0.5 ** (t / 10) for t in range(20)]
    np.testing.assert_allclose(deviations(watch.added), right, rtol=5 / math.sqrt(2 * NUMBERS))
    # Without noise each of 20 examples, all of them drawn, moves a bias by the norm.
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(1.0), "mse")
    model.layers[0].kernel.trainable = False
    kept = [float(model.layers[0].bias.numpy()[0])]
    keep = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: kept.append(float(model.get_weights()[1][0]))
    )
    x, y = np.zeros((20, 1), "float32"), np.full((20, 1), 1e3, "float32")
    report = tfdist.fit(
        model, x, y, batch_size=20, epochs=9, verbose=0, callbacks=[keep],
        privacy=sgd(0.0, clip=clip),
    ).privacy  # fmt: skip
    moved = [0.5 * 0.5 ** (step / 10) for step in range(9)]
    np.testing.assert_allclose(np.diff(kept), moved, rtol=1e-5)
    assert math.isinf(report.epsilon)


def test_a_budget_ends_what_follows_a_schedule() -> None:
    budget = tfdist.PrivacyBudget(composed([falling(step) for step in range(18)]) * 1.005)
    report = train(still(), steps=40, privacy=sgd(), callbacks=[budget]).privacy
    assert report.ledger.steps == 18


# --- trainings that go on ---------------------------------------------------------------


def test_a_training_that_was_killed_goes_on_in_the_schedule(tmp_path: Path) -> None:
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    watch, other = Watch((15, disk, copy)), Watch()
    saver = tfdist.Checkpoint(disk, every=10)
    train(still(), steps=20, privacy=sgd(), checkpoint=saver, callbacks=[watch])
    saver = tfdist.Checkpoint(copy, every=10)
    report = train(
        still(), steps=20, privacy=sgd(), checkpoint=saver, callbacks=[other]
    ).privacy
    # 10 are in the weights, so the 11th is next; 15 were made, or one more was written down.
    right = [falling(10 + t) for t in range(10)]
    np.testing.assert_allclose(deviations(other.added[10:]), right, rtol=0.1)
    made = report.ledger.steps - 10
    assert 15 <= made <= 16
    assert by_noise(report) == {4.0: 4, 2.0: 10 + 4, 1.0: made - 14 + 6}
    # Ended on purpose, it loses nothing; more epochs and another end of the schedule follow.
    later = S.PiecewiseConstantDecay([3, 13, 25], [4.0, 2.0, 1.0, 3.0])
    report = train(still(), steps=28, privacy=sgd(later), checkpoint=saver).privacy
    assert by_noise(report) == {4.0: 4, 2.0: 14, 1.0: made - 8 + 6, 3.0: 2}
    # What the processes know of each other is the same, whoever is asked first.
    again = Ledger.from_dict(report.ledger.to_dict())
    assert again.merged(report.ledger).to_dict() == report.ledger.to_dict()


@pytest.mark.full  # a checkpoint, in the test before, goes on in the same way
def test_a_backup_goes_on_in_the_schedule_with_its_factor(tmp_path: Path) -> None:
    disk, copy = tmp_path / "disk", tmp_path / "copy"

    def backup(where: Path) -> Any:
        return keras.callbacks.BackupAndRestore(where, save_freq=10)

    target = sgd(target_epsilon=2.0)
    watch, other = Watch((15, disk, copy)), Watch()
    first = train(still(), steps=24, privacy=target, callbacks=[backup(disk), watch]).privacy
    assert 1.96 < first.epsilon <= 2.0
    factor = first.ledger.phases[0].noise_multiplier / 4
    assert [p.noise_multiplier / factor for p in first.ledger.phases] == [4.0, 2.0, 1.0]
    report = train(still(), steps=24, privacy=target, callbacks=[backup(copy), other]).privacy
    assert 1.8 < report.epsilon <= 2.0
    after = deviations(other.added) / factor
    right = [falling(10 + t) for t in range(len(after))]
    np.testing.assert_allclose(after, right, rtol=0.1)
    made: dict[float, int] = {}
    for phase in report.ledger.phases:
        level = round(phase.noise_multiplier / factor, 6)
        made[level] = made.get(level, 0) + phase.steps
    # 15 of the first, or one more that was written down, and those from the 11th on.
    assert made[4.0] == 4
    assert made[2.0] == 10 + 4
    assert 1 + len(after) - 4 <= made[1.0] <= 2 + len(after) - 4
