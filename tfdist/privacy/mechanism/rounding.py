"""Bounds of rounding errors, by which norms are enlarged.

The norm that an example's gradient is clipped by must never be below the norm of what is added
to the sum, or the example contributes more than the clipping norm. The bounds are the standard
ones of sums and inner products, which hold for any order of the additions (Higham, "Accuracy
and Stability of Numerical Algorithms", 2nd ed., 2002, section 3.1).
"""

from __future__ import annotations

import math
import os
from typing import Any

import tensorflow as tf

from tfdist.errors import ArgumentError

Tensor = Any

UNIT = 2.0**-24  # half a step of float32 at 1
UNDERFLOW = 2.0**-126  # what is smaller may be taken for 0
_ONE_LEVEL = 2048  # terms of a sum that is worth no second level
_MIXED = ("auto_mixed_precision", "auto_mixed_precision_onednn_bfloat16")
_FAST_MATH = ("TF_SET_ONEDNN_FPMATH_MODE", "ONEDNN_DEFAULT_FPMATH_MODE")


def gamma(terms: Any) -> Any:
    """Bounds the relative error of a sum, or inner product, of non-negative numbers.

    Of numbers of any sign it is the error over the sum of their magnitudes.

    Args:
        terms: How many there are, a number or a float32 tensor.
    """
    return (terms + 2.0) * (1.01 * UNIT)


def factor_unit() -> float:
    """Bounds the relative error with which products of matrices read their factors.

    GPUs round them to 11 bits (TensorFloat-32) unless that is turned off, TPUs to 8 bits, and
    oneDNN to 8 bits where the environment allows it. Else it is 0.

    Raises:
        ArgumentError: TensorFlow may rewrite any operation to a shorter type.
    """
    options = tf.config.optimizer.get_experimental_options()
    for name in _MIXED:
        if options.get(name):
            raise ArgumentError(
                "Norms of private training must be computed in float32. Received: "
                f"{name}=True in tf.config.optimizer, which rewrites their products. Use "
                "keras.config.set_dtype_policy('mixed_bfloat16') instead."
            )
    if any(os.environ.get(name, "strict").lower() != "strict" for name in _FAST_MATH):
        return 2.0**-8
    if tf.config.list_logical_devices("TPU"):
        return 2.0**-8
    rounds = tf.config.experimental.tensor_float_32_execution_enabled()
    return 2.0**-11 if rounds and tf.config.list_logical_devices("GPU") else 0.0


def product_gamma(terms: Any) -> Any:
    """Bounds the error of an inner product that a product of matrices computes.

    Args:
        terms: As in `gamma`.

    Returns:
        The error over the sum of the products' magnitudes.
    """
    unit = factor_unit()
    # Units that multiply short factors may also cut sums off, rather than round them.
    return gamma(terms) * (4 if unit else 1) + 2.02 * unit


def sums_of_squares(values: Tensor) -> Tensor:
    """Sums squares, example by example, and rounds up.

    In two levels, so that the error stays small: of n numbers it is of the order of sqrt(n).

    Args:
        values: float32, shape [examples, ...], of known sizes but for the first.

    Returns:
        float32 of shape [examples], not below the exact sums unless squares underflow.
    """
    sizes = [int(size) for size in values.shape[1:]]
    count = math.prod(sizes)
    outer = 1
    if count > _ONE_LEVEL:
        outer = next(n for n in range(math.isqrt(count), 0, -1) if count % n == 0)
    inner = count // outer
    squares = tf.square(tf.reshape(values, [-1, outer, inner]))
    # The factor in between also keeps compilers from making one sum of both.
    level = tf.reduce_sum(squares, 2) * (1 + gamma(inner + 2))
    whole = level[:, 0] if outer == 1 else tf.reduce_sum(level, 1)
    return whole * (1 + gamma(outer + 2))
