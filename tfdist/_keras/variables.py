"""Where variables live, and which of them a step assigns."""

from __future__ import annotations

from typing import Any

from keras.src.backend.tensorflow.core import Variable as _Variable

from tfdist._keras.replica import Tensor, current_batch

_keras_direct_assign = _Variable._direct_assign


def direct_assign(variable: Any, value: Tensor) -> None:
    batch = current_batch()
    if batch is not None:
        batch.touch(variable)
    _keras_direct_assign(variable, value)


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
