from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

import tfdist
from tests.equivalence.cases import mlp, table
from tfdist.errors import ArgumentError

pytestmark = pytest.mark.quick
ROWS, BATCH = 64, 16
STEPS = ROWS // BATCH


class Rates(keras.callbacks.Callback):
    """Notes the rate of every step."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.seen.append(float(self.model.optimizer.learning_rate))


def train(optimizer: Any, *callbacks: Any, epochs: int = 3) -> tuple[Any, list[float]]:
    model, rates = mlp(optimizer), Rates()
    options = {"batch_size": BATCH, "epochs": epochs, "verbose": 0, "seed": 1}
    tfdist.fit(model, *table(ROWS), callbacks=[*callbacks, rates], **options)
    return model, rates.seen


def test_warmup_rises_step_by_step_and_stays():
    model, seen = train(keras.optimizers.SGD(0.5), tfdist.LearningRateWarmup(2, start=0.2))
    expected = 0.5 * (0.2 + 0.8 * np.minimum(1.0, np.arange(3 * STEPS) / (2 * STEPS)))
    np.testing.assert_allclose(seen, expected, rtol=1e-6)
    assert float(model.optimizer.learning_rate) == 0.5


def test_training_that_ends_within_the_warmup_leaves_the_whole_rate():
    for callbacks in (
        [tfdist.LearningRateWarmup(5, 0.1)],
        [tfdist.LearningRateWarmup(5, 0.1), tfdist.LearningRateScaling(4)],
    ):
        model, _ = train(keras.optimizers.SGD(0.5), *callbacks, epochs=1)
        assert float(model.optimizer.learning_rate) == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize(("rule", "factor"), [("linear", 4.0), ("sqrt", 2.0)])
def test_scaling_multiplies_while_training_and_once(rule, factor):
    scaling = tfdist.LearningRateScaling(4, rule)
    model, seen = train("sgd", scaling, epochs=1)
    np.testing.assert_allclose(seen, [0.01 * factor] * STEPS, rtol=1e-6)
    rates = Rates()
    tfdist.fit(model, *table(ROWS), callbacks=[rates, scaling], verbose=0)
    np.testing.assert_allclose(rates.seen, [0.01 * factor] * 2, rtol=1e-6)
    assert float(model.optimizer.learning_rate) == pytest.approx(0.01, rel=1e-6)


def test_factors_are_the_number_of_replicas_unless_given():
    _, seen = train("sgd", tfdist.LearningRateScaling(), tfdist.LearningRateWarmup(1))
    np.testing.assert_allclose(seen, [0.01] * 3 * STEPS, rtol=1e-6)  # one replica


def test_another_callback_may_lower_the_rate_between_epochs():
    halve = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: halve.model.optimizer.learning_rate.assign(
            halve.model.optimizer.learning_rate * 0.5
        )
    )
    _, seen = train(keras.optimizers.SGD(0.8), halve, tfdist.LearningRateWarmup(2, 0.5))
    expected = [0.4, 0.45, 0.5, 0.55, 0.3, 0.325, 0.35, 0.375, 0.2, 0.2, 0.2, 0.2]
    np.testing.assert_allclose(seen, expected, rtol=1e-5)


def test_a_scheduler_sets_the_rate_to_arrive_at():
    scheduler = keras.callbacks.LearningRateScheduler(lambda epoch: 0.4 if epoch < 2 else 0.1)
    _, seen = train("sgd", tfdist.LearningRateWarmup(1, 0.5), scheduler)
    np.testing.assert_allclose(seen, [0.2, 0.25, 0.3, 0.35, *[0.4] * 4, *[0.1] * 4], rtol=1e-5)


def test_resuming_within_the_warmup_goes_on_to_the_same_rate(tmp_path):
    def callbacks() -> list[Any]:
        backup = keras.callbacks.BackupAndRestore(tmp_path / "backup", delete_checkpoint=False)
        return [backup, tfdist.LearningRateScaling(4), tfdist.LearningRateWarmup(3, 0.25)]

    model, first = train(keras.optimizers.SGD(0.1), *callbacks(), epochs=2)
    model, then = train(keras.optimizers.SGD(0.1), *callbacks(), epochs=4)
    expected = 0.4 * (0.25 + 0.75 * np.minimum(1.0, np.arange(4 * STEPS) / (3 * STEPS)))
    np.testing.assert_allclose([*first, *then], expected, rtol=1e-5)
    assert float(model.optimizer.learning_rate.numpy()) == pytest.approx(0.1, rel=1e-6)


def test_momentum_is_corrected_for_the_rate():
    # With velocity v <- m (r'/r) v - r' g the path of a quadratic's gradient is that of
    # u <- m u + g, w <- w - r u, which knows no rate in its velocity.
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), loss=lambda y, p: p * p)
    model.set_weights([np.ones((1, 1), "float32")])
    warmup, rates = tfdist.LearningRateWarmup(2, 0.25), Rates()
    x = np.ones((4, 1), "float32")
    options = {"batch_size": 1, "epochs": 2, "verbose": 0, "callbacks": [warmup, rates]}
    tfdist.fit(model, x, x, **options)
    weight, velocity = 1.0, 0.0
    for rate in rates.seen:
        velocity = 0.9 * velocity + 2 * weight
        weight -= rate * velocity
    assert float(model.get_weights()[0][0, 0]) == pytest.approx(weight, rel=1e-5)


def test_loss_scaling_wraps_the_optimizer():
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1, momentum=0.9))
    _, seen = train(optimizer, tfdist.LearningRateWarmup(1, 0.5), epochs=1)
    np.testing.assert_allclose(seen, [0.05, 0.0625, 0.075, 0.0875], rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tfdist.LearningRateScaling(0), "factor=0"),
        (lambda: tfdist.LearningRateScaling(rule="square"), "rule='square'"),
        (lambda: tfdist.LearningRateWarmup(0), "epochs=0"),
        (lambda: tfdist.LearningRateWarmup(1, 1.5), "start=1.5"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()


def test_a_schedule_is_refused():
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)
    with pytest.raises(ArgumentError, match="learning_rate=ExponentialDecay, a schedule"):
        train(keras.optimizers.SGD(schedule), tfdist.LearningRateWarmup(1))
