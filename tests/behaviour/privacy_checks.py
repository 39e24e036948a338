"""What must hold of private training on any number of replicas; see `checks.py`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfdist
from tests.behaviour.checks import StopAt, everywhere, place, same_everywhere
from tests.behaviour.registry import (
    HOROVOD,
    MIRRORED,
    MULTI_WORKER,
    SERVERS,
    SINGLE,
    check,
)
from tests.equivalence.cases import private_mlp, table
from tfdist.errors import ArgumentError, StrategyError
from tfdist.privacy.mechanism.noise import Noise

L = keras.layers
PRIVACY = tfdist.DPSGD(0.5, noise_multiplier=2.0, delta=1e-4)


def steps_of_noise(privacy: Any) -> Any:
    """Trains without a gradient: how far each of 16 steps of 5 examples moved the weights."""
    model = keras.Sequential([keras.Input((40,)), L.Dense(50, use_bias=False)])
    model.compile(keras.optimizers.SGD(1.0), "mse")
    x, y = np.zeros((20, 40), "float32"), np.zeros((20, 50), "float32")
    weights = [model.get_weights()[0]]
    keep = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: weights.append(model.get_weights()[0])
    )
    options = {"batch_size": 5, "epochs": 16, "steps_per_epoch": 1, "verbose": 0}
    tfdist.fit(model, x, y, privacy=privacy, callbacks=[keep], **options)
    same_everywhere(model)
    return 5 * np.diff(np.array(weights), axis=0).reshape(16, -1)


@check(MIRRORED, HOROVOD, SERVERS, full=(SINGLE, MULTI_WORKER, "mirrored-4", "multi_worker-3"))
def noise_on_the_sum_has_the_right_deviation(folder: Path) -> None:
    """Without a gradient, weights move by noise alone.

    Of 32000 numbers the deviation is known within 2 % (5 of its own); a replica's share that
    is missing, or that is the same on another replica, is off by 18 % or more.
    """
    numbers = steps_of_noise(tfdist.DPSGD(0.7, noise_multiplier=1.5, delta=1e-3))
    # What replicas sum up are whole multiples of a grid; weights are floats.
    places = numbers / (1.5 * 0.7 / 64)
    np.testing.assert_allclose(places, np.round(places), atol=0.02)
    assert numbers.std() == pytest.approx(1.5 * 0.7, rel=0.02)
    assert abs(numbers.mean()) < 5 * 1.05 / math.sqrt(numbers.size)
    correlation = np.corrcoef(numbers)[np.triu_indices(16, 1)]
    assert np.abs(correlation).max() < 5.5 / math.sqrt(2000)


@check(full=(MIRRORED, MULTI_WORKER))
def noise_follows_a_schedule_on_all_replicas(folder: Path) -> None:
    """Of 2000 numbers a step the deviation is known within 8 %."""
    schedules = keras.optimizers.schedules
    noise = schedules.PiecewiseConstantDecay([3, 9], [3.0, 1.5, 0.75])
    clip = schedules.ExponentialDecay(0.7, 10, 0.5)
    numbers = steps_of_noise(tfdist.DPSGD(clip, noise_multiplier=noise, delta=1e-3))
    multipliers = np.repeat([3.0, 1.5, 0.75], [4, 6, 6])
    right = multipliers * 0.7 * 0.5 ** (np.arange(16) / 10)
    np.testing.assert_allclose(numbers.std(1), right, rtol=0.08)


@check(HOROVOD, full=(MIRRORED, MULTI_WORKER))
def noise_of_groups_that_take_turns_is_given_once(folder: Path) -> None:
    """Of 2000 numbers a step the deviation is known within 8 %."""
    numbers = steps_of_noise(tfdist.DPSGD(0.7, noise_multiplier=1.5, delta=1e-3, bands=3))
    own = numbers / (1.5 * 0.7)
    own[2:] = own[2:] + own[1:-1] / 2 + own[:-2] * 3 / 8  # (1 - x)^(-1/2), cut off
    own[1] += numbers[0] / (1.5 * 0.7) / 2
    np.testing.assert_allclose(own.std(1), 1.0, rtol=0.08)
    correlation = np.corrcoef(own)[np.triu_indices(16, 1)]
    assert np.abs(correlation).max() < 5.5 / math.sqrt(2000)


@check(full=(MIRRORED,))
def the_check_finds_noise_of_one_replica_alone(folder: Path) -> None:
    """And finds nothing where each replica adds its part."""
    model = keras.Sequential([keras.Input((30,)), L.Dense(20)])
    model.compile("sgd", "mse")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 30)), rng.normal(size=(60, 20))
    options: dict[str, Any] = {"batch_size": 10, "effort": 0.1, "parts": ["noise"]}
    sound = tfdist.privacy.check(model, x, y, PRIVACY, **options)
    assert sound.passed, str(sound)
    normal = Noise.normal

    def of_one(self: Any, count: int, replica: Any, step: Any) -> Any:
        drawn = normal(self, count, replica, step)
        return drawn * tf.cast(tf.equal(replica, 0), drawn.dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Noise, "normal", of_one)
        broken = tfdist.privacy.check(model, x, y, PRIVACY, **options)
    found = broken["noise: standard deviation over the right one"]
    assert not found.passed
    assert found.measured == pytest.approx(place().num_replicas ** -0.5, rel=0.05)


@check(MULTI_WORKER, full=(MIRRORED, HOROVOD, SERVERS))
def noise_that_is_taken_back_was_given_once(folder: Path) -> None:
    """With factors 1 and -1/2, of a step's own noise and of that of the step before.

    Noise on each of R replicas would be sqrt(R) times as much.
    """
    privacy = tfdist.DPFTRL(0.7, noise_multiplier=1.5, delta=1e-3, bands=2)
    numbers = steps_of_noise(privacy) / (1.5 * 0.7)
    np.testing.assert_allclose(numbers * 64, np.round(numbers * 64), atol=0.02)
    assert numbers[0].std() == pytest.approx(1.0, rel=0.08)
    assert numbers[1:].std() == pytest.approx(math.sqrt(1.25), rel=0.02)
    assert (numbers[1:] * numbers[:-1]).mean() == pytest.approx(-0.5, abs=0.04)
    assert abs((numbers[2:] * numbers[:-2]).mean()) < 0.04


@check(MULTI_WORKER, full=(MIRRORED, HOROVOD))
def all_workers_draw_and_count_the_same(folder: Path) -> None:
    model = private_mlp(keras.optimizers.SGD(0.1))
    initial = model.get_weights()
    history = tfdist.fit(model, *table(), batch_size=64, verbose=0, privacy=PRIVACY)
    same_everywhere(model)
    report = history.privacy
    assert report.secret
    assert report.ledger.steps == 16
    assert len(set(everywhere(report.ledger))) == 1
    weights = model.get_weights()
    model.set_weights(initial)
    tfdist.fit(model, *table(), batch_size=64, verbose=0, privacy=PRIVACY)
    # `init` was given a seed, and yet nobody knows what is drawn.
    assert all((a != b).any() for a, b in zip(weights, model.get_weights(), strict=True))


@check(MULTI_WORKER, full=(HOROVOD, SERVERS))
def the_budget_stops_all_workers_at_the_same_step(folder: Path) -> None:
    model = private_mlp(keras.optimizers.SGD(0.1))
    budget = tfdist.PrivacyBudget(0.6)
    options = {"batch_size": 64, "epochs": 20, "verbose": 0, "privacy": PRIVACY}
    history = tfdist.fit(model, *table(), callbacks=[budget], **options)
    steps = history.privacy.ledger.steps
    assert steps == int(model.optimizer.iterations.numpy())
    assert 16 < steps < 320
    assert history.history["epsilon"][-1] <= 0.6
    assert len(set(everywhere((steps, *history.history["epsilon"])))) == 1
    same_everywhere(model)


@check(HOROVOD, full=(MULTI_WORKER,))
def a_stop_that_one_worker_asks_for_is_counted_exactly(folder: Path) -> None:
    model = private_mlp(keras.optimizers.SGD(0.1))
    asks = [StopAt(4, place().num_workers - 1)]
    options = {"batch_size": 64, "epochs": 3, "verbose": 0, "privacy": PRIVACY}
    history = tfdist.fit(model, *table(), callbacks=asks, **options)
    steps = history.privacy.ledger.steps
    assert steps == int(model.optimizer.iterations.numpy()) < 16
    assert len(set(everywhere(steps))) == 1


def refused(error: type[Exception], message: str, **options: Any) -> None:
    model = private_mlp("sgd")
    before = model.get_weights()
    with pytest.raises(error, match=message):
        tfdist.fit(model, *table(), batch_size=64, verbose=0, privacy=PRIVACY, **options)
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)


@check(HOROVOD)
def gradients_that_are_not_summed_as_they_are_are_refused(folder: Path) -> None:
    for options in ({"compression": "fp16"}, {"op": "adasum"}):
        strategy = tfdist.Horovod(**options)
        refused(ArgumentError, "must be summed as they are", strategy=strategy)


@check(SERVERS)
def asynchronous_servers_are_refused(folder: Path) -> None:
    strategy = tfdist.ParameterServer(min_part_bytes=256)
    refused(StrategyError, "needs a synchronous strategy", strategy=strategy)


class Late(L.Layer):
    """Mixes the examples of batches of which a replica has more than were tried at first."""

    def call(self, inputs: Any) -> Any:
        is_large = keras.ops.cast(keras.ops.shape(inputs)[0] > 20, inputs.dtype)
        return inputs + is_large * keras.ops.mean(inputs, 0, keepdims=True)


@check(HOROVOD, full=(SINGLE, MIRRORED, MULTI_WORKER, SERVERS))
def examples_that_are_mixed_end_the_training_on_all_workers(folder: Path) -> None:
    model = keras.Sequential([keras.Input((20,)), Late(), L.Dense(1)])
    model.compile("sgd", "mse")
    before = model.get_weights()
    with pytest.raises(ArgumentError, match="that step was not made"):
        tfdist.fit(model, *table(), batch_size=120, verbose=0, privacy=PRIVACY)
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)
    same_everywhere(model)
