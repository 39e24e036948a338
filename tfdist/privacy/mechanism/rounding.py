"""Bounds of rounding errors. Norms are enlarged by them before clipping.

The computed norm of an example's gradient must never be below the true norm of what the example
adds to the sum. Otherwise the example contributes more than the clipping norm, and epsilon is
wrong. The bounds are the standard ones of sums and inner products, and hold for any order of
the additions (Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., 2002,
section 3.1).
"""

from __future__ import annotations

import math
import os
from typing import Any

import tensorflow as tf

from tfdist.errors import ArgumentError

Tensor = Any

UNIT = 2.0**-24  # half a step of float32 at 1
UNDERFLOW = 2.0**-126  # devices may replace smaller numbers by 0
_ONE_LEVEL = 2048  # the most terms of a sum without a second level
_MIXED = ("auto_mixed_precision", "auto_mixed_precision_onednn_bfloat16")
_FAST_MATH = ("TF_SET_ONEDNN_FPMATH_MODE", "ONEDNN_DEFAULT_FPMATH_MODE")


def gamma(terms: Any) -> Any:
    """Bounds the relative error of a sum, or inner product, of non-negative numbers.

    For numbers of any sign it bounds the error over the sum of their magnitudes. The factor
    1.01 bounds 1 / (1 - n u) of Higham's gamma_n for up to 160,000 terms.

    Args:
        terms: The number of terms, a number or a float32 tensor.
    """
    return (terms + 2.0) * (1.01 * UNIT)


def factor_unit() -> float:
    """Bounds the relative error with which matrix products read their factors.

    GPUs round factors to 11 bits (TensorFloat-32) unless it is turned off. TPUs round to 8
    bits, and so does oneDNN if the environment allows it. Otherwise the error is 0.

    Raises:
        ArgumentError: TensorFlow may rewrite any operation to a shorter type.
    """
    options = tf.config.optimizer.get_experimental_options()
    for name in _MIXED:
        if options.get(name):
            raise ArgumentError(
                f"Norms of private training must be computed in float32. Received: {name}=True "
                "in tf.config.optimizer, which changes the type of their products. Use "
                "keras.config.set_dtype_policy('mixed_bfloat16') instead."
            )
    if any(os.environ.get(name, "strict").lower() != "strict" for name in _FAST_MATH):
        return 2.0**-8
    if tf.config.list_logical_devices("TPU"):
        return 2.0**-8
    rounds = tf.config.experimental.tensor_float_32_execution_enabled()
    return 2.0**-11 if rounds and tf.config.list_logical_devices("GPU") else 0.0


def product_gamma(terms: Any) -> Any:
    """Bounds the error of an inner product within a matrix product.

    Args:
        terms: As in `gamma`.

    Returns:
        The error over the sum of the products' magnitudes.
    """
    unit = factor_unit()
    # Hardware for short factors may truncate sums instead of rounding them, so the bound of
    # the sum is four times as large.
    return gamma(terms) * (4 if unit else 1) + 2.02 * unit


def sums_of_squares(values: Tensor) -> Tensor:
    """Sums the squares of each example's values, and rounds up.

    The sum has two levels, so that the error bound of n numbers grows as sqrt(n), not as n.

    Args:
        values: float32, shape [examples, ...]. All sizes but the first must be static.

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
    # The factor between the levels also keeps compilers from merging both sums into one.
    level = tf.reduce_sum(squares, 2) * (1 + gamma(inner + 2))
    total = level[:, 0] if outer == 1 else tf.reduce_sum(level, 1)
    return total * (1 + gamma(outer + 2))
