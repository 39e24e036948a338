"""What a client of a federated training changes: optimizers that begin anew, statistics."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np

from tfdist.errors import ArgumentError

Tensor = Any


def iterations_of(optimizer: Any) -> Any:
    """Returns the variable in which an optimizer counts its updates.

    Args:
        optimizer: A `keras.Optimizer`.
    """
    return optimizer._iterations


def rates_of(optimizers: Sequence[Any]) -> list[Any]:
    """Lists the learning rates that are variables.

    Args:
        optimizers: `keras.Optimizer`s.
    """
    rates = [optimizer._learning_rate for optimizer in optimizers]
    return [rate for rate in rates if isinstance(rate, keras.Variable)]


def built_copy(optimizer: Any, variables: Sequence[Any]) -> Any:
    """Makes a new optimizer of the same settings, with its first state.

    Args:
        optimizer: A `keras.Optimizer`.
        variables: The `keras.Variable`s that the new one trains.

    Raises:
        ArgumentError: The optimizer cannot be made from its `get_config`.
    """
    try:
        copy = type(optimizer).from_config(optimizer.get_config())
        copy.build(list(variables))
    except Exception as error:
        raise ArgumentError(
            "Federated training makes new optimizers, so an optimizer must be one that its "
            f"`from_config` makes from its `get_config`. Received: {type(optimizer).__name__}, "
            f"which raised {type(error).__name__}: {error}. Define both methods."
        ) from error
    return copy


def first_values(optimizer: Any) -> list[Any]:
    """Returns the values that the variables of a new optimizer of these settings have.

    Args:
        optimizer: A built `keras.Optimizer`.

    Returns:
        For each variable of the optimizer an array, of shape [] if all elements are equal.

    Raises:
        ArgumentError: See `built_copy`; or a new one has other variables.
    """
    copy = built_copy(optimizer, optimizer._trainable_variables)
    shapes = [[tuple(v.shape) for v in o.variables] for o in (optimizer, copy)]
    if shapes[0] != shapes[1]:
        raise ArgumentError(
            "Federated training makes new optimizers, so an optimizer must have the variables "
            f"of a new one of its settings. Received: {type(optimizer).__name__} with "
            f"{len(shapes[0])} variables, a new one has {len(shapes[1])}. Create all of them "
            "in `build`."
        )
    values = [np.asarray(variable.numpy()) for variable in copy.variables]
    is_uniform = [v.size > 0 and (v == v.flat[0]).all() for v in values]
    return [v.flat[0] if same else v for v, same in zip(values, is_uniform, strict=True)]


class _LaterSchedule(keras.optimizers.schedules.LearningRateSchedule):  # type: ignore[misc]
    """A schedule that counts steps before the optimizer's first one.

    Args:
        schedule: The schedule.
        steps: Number of steps before, a scalar tensor.
    """

    def __init__(self, schedule: Any, steps: Tensor) -> None:
        self._schedule = schedule
        self._steps = steps

    def __call__(self, step: Any) -> Any:
        """Returns the rate at a step of the optimizer."""
        return self._schedule(keras.ops.add(step, keras.ops.cast(self._steps, step.dtype)))

    def get_config(self) -> dict[str, Any]:
        """Not needed: it lives while a step is traced."""
        raise NotImplementedError


@contextlib.contextmanager
def schedules_after(optimizers: Sequence[Any], steps: Tensor) -> Iterator[None]:
    """Makes a context in which learning rate schedules go on, for optimizers that begin anew.

    Args:
        optimizers: `keras.Optimizer`s.
        steps: Number of steps before the optimizers' first ones, a scalar tensor.
    """
    schedules = keras.optimizers.schedules.LearningRateSchedule
    scheduled = [o for o in optimizers if isinstance(o._learning_rate, schedules)]
    former = [optimizer._learning_rate for optimizer in scheduled]
    for optimizer, schedule in zip(scheduled, former, strict=True):
        vars(optimizer)["_learning_rate"] = _LaterSchedule(schedule, steps)
    try:
        yield
    finally:
        for optimizer, schedule in zip(scheduled, former, strict=True):
            vars(optimizer)["_learning_rate"] = schedule


def statistics_of(model: Any) -> list[Any]:
    """Lists what layers keep besides weights, such as BatchNormalization's moving averages.

    Weights that are frozen are not in it, although they are not trainable.

    Args:
        model: A `keras.Model`.

    Returns:
        `keras.Variable`s, each once.
    """
    layers = model._flatten_layers()
    variables = [v for layer in layers for v in layer._non_trainable_variables]
    return list({id(v): v for v in variables}.values())
