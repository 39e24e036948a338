"""Optimizers whose state takes no memory between their build and the training."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.optimizers.base_optimizer import BaseOptimizer as _BaseOptimizer

from tfdist._keras.deferred import deferred
from tfdist._keras.interception import replaced
from tfdist._keras.optimizers import with_nested
from tfdist._keras.served_updates import is_elementwise
from tfdist._keras.variables import empty, is_empty, refill

_FILL = "_tfdist_fill"  # the attribute of a variable that has no value yet


@contextlib.contextmanager
def built_unfilled(optimizers: Sequence[Any]) -> Iterator[None]:
    """Makes a context in which optimizers are built without memory for their state.

    A variable that begins with equal elements gets them by `fill`, at the latest where the
    context ends. While the optimizer is built, one variable at a time has memory.

    Args:
        optimizers: `keras.Optimizer`s, with those that they wrap.
    """
    optimizer_ids = {id(optimizer) for optimizer in optimizers}
    original = _BaseOptimizer.add_variable_from_reference

    @functools.wraps(original)
    def add(
        optimizer: Any, reference_variable: Any, name: Any = None, initializer: Any = "zeros"
    ) -> Any:
        variable = original(optimizer, reference_variable, name=name, initializer=initializer)
        value = None if deferred(variable) else _fill_value(initializer)
        # Others may assign a variable in their `build`, as ScheduleFreeAdamW does.
        may_be_empty = id(optimizer) in optimizer_ids and is_elementwise(optimizer)
        if may_be_empty and value is not None and tf.executing_eagerly():
            setattr(variable, _FILL, value)
            empty(variable._value)
        return variable

    try:
        with replaced(_BaseOptimizer, "add_variable_from_reference", add):
            yield
    finally:
        # Also if an error ends the build: no variable must be left without a value.
        for optimizer in with_nested(optimizers):
            for variable in optimizer.variables:
                fill(variable)


def unfilled_value(variable: Any) -> float | None:
    """Returns the value that each element of a variable will get by `fill`, or None.

    Args:
        variable: A `keras.Variable`.
    """
    value = getattr(variable, _FILL, None)
    return value if value is not None and is_empty(variable) else None


def fill(variable: Any) -> None:
    """Gives a variable its first value, if it has none.

    Args:
        variable: A `keras.Variable`.
    """
    value = unfilled_value(variable)
    note_filled(variable)
    if value is not None:
        refill(variable._value, [np.full(variable.shape, value, variable.dtype)])


def note_filled(variable: Any) -> None:
    """Notes that a variable has its first value.

    Args:
        variable: A `keras.Variable`.
    """
    if hasattr(variable, _FILL):
        delattr(variable, _FILL)


def _fill_value(initializer: Any) -> float | None:
    initializer = keras.initializers.get(initializer)
    if type(initializer) is keras.initializers.Zeros:
        return 0.0
    if type(initializer) is keras.initializers.Constant:
        value = initializer.value
        return float(value) if np.ndim(value) == 0 else None
    return None
