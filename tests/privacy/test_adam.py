"""DPAdam: the noise's variance is subtracted from the second moment."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

import tfdist
from tfdist._keras import layers as keras_layers
from tfdist.errors import ArgumentError
from tfdist.privacy import DPAdam


def adam_bc(gradients: Any, deviations: Any, rate: float, floor: float) -> Any:
    """Algorithm 1 of the paper, beginning at 0; the variance may change from step to step."""
    weight = mean = square = np.zeros_like(gradients[0])
    noise = 0.0
    for step, (gradient, deviation) in enumerate(zip(gradients, deviations, strict=True), 1):
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        noise = 0.999 * noise + 0.001 * deviation**2
        corrected = (square - noise) / (1 - 0.999**step)
        weight = weight - rate * mean / (1 - 0.9**step) / np.sqrt(np.maximum(corrected, floor))
    return weight


@pytest.mark.quick
def test_steps_are_those_of_the_paper() -> None:
    rng = np.random.default_rng(0)
    gradients = rng.normal(0.3, 0.5, (30, 7))
    deviations = np.linspace(0.5, 0.4, 30)
    weight = keras.Variable(np.zeros(7, "float32"))
    optimizer = DPAdam(0.1, variance_floor=1e-3)
    optimizer.build([weight])
    for gradient, deviation in zip(gradients, deviations, strict=True):
        optimizer.noise_deviation = lambda deviation=deviation: deviation
        optimizer.apply([keras.ops.convert_to_tensor(gradient.astype("float32"))])
    expected = adam_bc(gradients, deviations, 0.1, 1e-3)
    np.testing.assert_allclose(weight.numpy(), expected, rtol=1e-4)
    corrected = np.mean(gradients**2, 0) - 0.2
    assert (corrected < 1e-3).any() != (corrected < 1e-3).all()  # both branches
    assert keras_layers.index_of(optimizer, weight) == 0


def noise_alone(optimizer: Any) -> tuple[list[Any], Any]:
    """Trains a weight whose gradient is 0 with known noise, and gives all its values."""
    model = keras.Sequential([keras.Input((10,)), keras.layers.Dense(20, use_bias=False)])
    model.compile(optimizer, "mse")
    model.set_weights([np.zeros((10, 20))])
    x, y = np.zeros((20, 10), "float32"), np.zeros((20, 20), "float32")
    kept = [model.get_weights()[0]]
    keep = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: kept.append(model.get_weights()[0])
    )
    privacy = tfdist.DPSGD(0.7, noise_multiplier=1.5, delta=1e-3, seed=5)
    options = {"batch_size": 5, "epochs": 3, "verbose": 0, "callbacks": [keep]}
    tfdist.fit(model, x, y, privacy=privacy, **options)
    return kept, model


def test_fit_tells_the_noise_and_takes_it_back() -> None:
    moved = -np.diff(np.array(noise_alone(keras.optimizers.SGD(1.0))[0]), axis=0)
    gradients = moved.astype("float64")
    expected = adam_bc(gradients, [1.5 * 0.7 / 5] * 12, 0.01, 1e-3)
    received, model = noise_alone(DPAdam(0.01, variance_floor=1e-3))
    # A variance that is nearly all noise loses digits in the difference.
    np.testing.assert_allclose(received[-1], expected, rtol=0.01, atol=1e-4)
    plain = adam_bc(gradients, [0.0] * 12, 0.01, 1e-3)
    assert np.abs(plain - expected).max() > 0.05
    tfdist.fit(model, np.zeros((4, 10)), np.zeros((4, 20)), verbose=0)
    assert model.optimizer.noise_deviation is None


@pytest.mark.quick
def test_is_made_again_from_its_config() -> None:
    optimizer = DPAdam(0.1, beta_2=0.9, variance_floor=1e-4, weight_decay=0.1)
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert isinstance(again, DPAdam)
    assert again.get_config() == optimizer.get_config()
    with pytest.raises(ArgumentError, match="`variance_floor` must be a number above 0"):
        DPAdam(variance_floor=0)
