"""The backing variables of `keras.Variable`s, and a record of assignments."""

from __future__ import annotations

import math
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
    """Makes `int` or `float` work for a mirrored variable, for which Keras's version fails.

    Args:
        kind: `int` or `float`.
    """

    def number(variable: Any) -> Any:
        value = variable._value
        has_copies = isinstance(value, tf.distribute.DistributedValues)
        return kind(value.numpy() if has_copies and not value.shape.rank else variable.value)

    return number


def num_bytes(variable: Any) -> int:
    """Counts the bytes of a variable.

    Args:
        variable: A built `keras.Variable`.
    """
    return math.prod(map(int, variable.shape)) * int(tf.as_dtype(variable.dtype).size)


def backing_variable(variable: Any) -> Any:
    """Returns the backing `tf.Variable` of a `keras.Variable`.

    Args:
        variable: The `keras.Variable`.
    """
    return variable._value


def swap_value(variable: Any, value: Any) -> Any:
    """Replaces the backing `tf.Variable` of a `keras.Variable`.

    Args:
        variable: The `keras.Variable`.
        value: A `tf.Variable` of its shape and dtype.

    Returns:
        The former backing `tf.Variable`.
    """
    before = variable._value
    variable._value = value
    return before
