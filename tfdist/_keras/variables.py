"""Where variables live, and which of them a step assigns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf
from keras.src.backend.tensorflow.core import Variable as _Variable

from tfdist._keras.replica import Tensor, current_batch

_keras_direct_assign = _Variable._direct_assign


def direct_assign(variable: Any, value: Tensor) -> None:
    batch = current_batch()
    if batch is not None:
        batch.touch(variable)
    _keras_direct_assign(variable, value)


def as_python(kind: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Makes `int` or `float` of a variable, which Keras cannot where there are copies of it.

    Args:
        kind: `int` or `float`.
    """

    def number(variable: Any) -> Any:
        value = variable._value
        has_copies = isinstance(value, tf.distribute.DistributedValues)
        return kind(value.numpy() if has_copies and not value.shape.rank else variable.value)

    return number


def backing_variable(variable: Any) -> Any:
    """Gives the `tf.Variable` that a `keras.Variable` lives in.

    Args:
        variable: The `keras.Variable`.
    """
    return variable._value


def swap_value(variable: Any, value: Any) -> Any:
    """Gives a `keras.Variable` another `tf.Variable` to live in.

    Args:
        variable: The `keras.Variable`.
        value: A `tf.Variable` of its shape and dtype.

    Returns:
        The `tf.Variable` it lived in before.
    """
    before = variable._value
    variable._value = value
    return before
