"""Sums of gradients that overflow where those of one process do."""

from __future__ import annotations

import math
from typing import Any

import tensorflow as tf

from tfdist._keras.replica import Tensor

_LEAST_OVERFLOW = 65520.0  # the least number that float16 rounds to infinity
# What Keras and TensorFlow do with a gradient after it was converted to float32.
_PASSES = ("AddN", "AddV2", "Identity", "Mul", "Reshape")
_DEEPEST = 8


def overflowing_as(gradient: Any, total: Any) -> Any:
    """Lets a sum over replicas overflow if it would in one process.

    There the gradient of a batch is a float16 number. Replicas sum their parts in float32.

    Args:
        gradient: This replica's part.
        total: The sum, or a part of its elements.
    """
    is_dense = tf.is_symbolic_tensor(gradient) and not isinstance(gradient, tf.IndexedSlices)
    if not is_dense or isinstance(total, tf.IndexedSlices) or not _is_of_float16(gradient):
        return total
    infinite = tf.math.sign(total) * math.inf
    return tf.where(tf.abs(total) >= _LEAST_OVERFLOW, infinite, total)


def _is_of_float16(tensor: Tensor, depth: int = 0) -> bool:
    """Tells whether a tensor was computed in float16 and converted."""
    if tensor.op.type == "Cast":
        return bool(tensor.op.inputs[0].dtype == tf.float16)
    if tensor.op.type not in _PASSES or depth == _DEEPEST:
        return False
    return any(_is_of_float16(given, depth + 1) for given in tensor.op.inputs)
