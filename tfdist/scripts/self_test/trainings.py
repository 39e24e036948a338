"""The small trainings of `tfdist test`, which must end with the weights of one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

L = keras.layers
Weights = dict[str, Any]

ROWS, COLUMNS, CLASSES = 61, 12, 4
# The last batch is smaller, and no batch can be divided evenly by 2 or 4.
BATCH, EPOCHS = 25, 2


@dataclass(frozen=True)
class SmallTraining:
    """A training.

    Attributes:
        name: Its name in the report.
        policy: The dtype policy of the model.
        tolerance: The largest distance of a variable from that of one process, relative to
            its largest element.
        floatx: Keras's default dtype, in which it holds the value of the loss.
        is_linear: Whether gradients do not depend on the weights. Then the order of updates
            does not matter, so asynchronous training has the same result.
    """

    name: str
    policy: str
    tolerance: float
    floatx: str = "float32"
    is_linear: bool = False


TRAININGS = (
    SmallTraining("float32", "float32", 2e-5),
    SmallTraining("float64", "float64", 1e-12, floatx="float64"),
    SmallTraining("bfloat16", "mixed_bfloat16", 5e-2),
    SmallTraining("linear", "float32", 2e-5, is_linear=True),
)


def train(training: SmallTraining, fit: Callable[..., Any]) -> Weights:
    """Trains a new model.

    Args:
        training: The training.
        fit: Called with the model and the arguments of Keras's `fit`.

    Returns:
        The values of all variables of the model, by name, as NumPy arrays of float64.
    """
    keras.utils.set_random_seed(3)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, COLUMNS)).astype("float32")
    y = rng.integers(0, CLASSES, size=ROWS)
    policy, floatx = keras.config.dtype_policy(), keras.config.floatx()
    keras.config.set_floatx(training.floatx)
    keras.config.set_dtype_policy(training.policy)
    try:
        model = _linear() if training.is_linear else _network()
        fit(model, x, y, batch_size=BATCH, epochs=EPOCHS, shuffle=False, verbose=0)
    finally:
        keras.config.set_floatx(floatx)
        keras.config.set_dtype_policy(policy)
    return {
        f"{number} {variable.name}": np.asarray(variable, np.float64)
        for number, variable in enumerate(model.variables)
        if "seed_generator" not in variable.path
    }


def _network() -> Any:
    # Smooth: on a ReLU's edge, the last bit of an input changes the result.
    model = keras.Sequential(
        [
            keras.Input((COLUMNS,)),
            L.Dense(16, "tanh"),
            L.BatchNormalization(synchronized=True),
            L.Dropout(0.3),
            L.Dense(CLASSES, dtype=keras.config.floatx()),
        ]
    )
    model.compile(
        keras.optimizers.SGD(0.1, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


def _linear() -> Any:
    model = keras.Sequential([keras.Input((COLUMNS,)), L.Dense(CLASSES)])
    model.compile(keras.optimizers.SGD(0.1), _sum_of_outputs)
    return model


def _sum_of_outputs(y_true: Any, y_pred: Any) -> Any:
    return keras.ops.sum(y_pred, axis=-1)


def distance(weights: Weights, reference: Weights) -> float:
    """Returns the largest distance of a variable from its reference, relative to that.

    Args:
        weights: The values of variables.
        reference: Those of one process.

    Returns:
        The distance; infinite if there are other variables, or a value is not finite.
    """
    if weights.keys() != reference.keys():
        return float("inf")
    distances = [0.0]
    for name, value in weights.items():
        if value.shape != reference[name].shape or not np.isfinite(value).all():
            return float("inf")
        scale = max(float(np.abs(reference[name]).max(initial=0.0)), 1e-6)
        distances.append(float(np.abs(value - reference[name]).max(initial=0.0)) / scale)
    return max(distances)
