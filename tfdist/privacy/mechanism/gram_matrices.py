"""Squared norms from Gram matrices, with bounds of their rounding errors.

The gradients at two positions of a sequence may cancel, and their sum may be smaller than the
rounding errors of the Gram matrices. So each norm is enlarged by a bound of two errors: the
error of the norm itself, and the error with which the example's gradient enters the weighted
sum.

On processors XLA multiplies a batch of small matrices 2 to 3 times as fast as TensorFlow's
`BatchMatMul`, and keeps no product (docs/privacy.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tfdist.privacy.mechanism.rounding import UNDERFLOW, UNIT, factor_unit, gamma, product_gamma

Tensor = Any
# Operations for an example. XLA takes some 0.1 s to compile each new shape.
_WORTH_COMPILING = 2**20
_CHUNK = 512  # columns per product: the error bound grows with their number
# The most that the norms of an example's products may add up to, in norms of their sum, for a
# weighted sum in float32.
_CANCELS = 16.0


def squared_norms_of_products(inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the squared Frobenius norm of each example's inputs^T outputs, or a little more.

    For P positions, p and q columns and S = sum_t |inputs_t| |outputs_t|, the computed square
    differs from the exact one by at most (g(p) + g(q) + g(2 P)) S^2, with g(n) about n * 2^-24.
    This bound is added. If positions do not cancel, S is at most sqrt(P) norms, and the norm
    grows by about (p + q + 2 P) P * 2^-25 of itself: 0.15 % for 64 positions of 128 and 512
    numbers.

    Args:
        inputs: float32 of shape [examples, positions, p].
        outputs: float32 of shape [examples, positions, q].

    Returns:
        The squares, float32 of shape [examples], and whether the products of an example cancel
        so far that they must be summed in float64, a bool scalar.
    """
    squares, cancels = _maybe_compiled(_of_products, inputs, outputs)(inputs, outputs)
    return squares, cancels


def squared_norms_by_row(rows: Tensor, outputs: Tensor) -> Tensor:
    """Returns the squared norm of each example's outputs summed by row, or a little more.

    Args:
        rows: Integers of shape [examples, positions].
        outputs: float32 of shape [examples, positions, q].

    Returns:
        float32 of shape [examples].
    """
    return _maybe_compiled(_by_row, outputs)(rows, outputs)


def _of_products(inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    positions = _positions(inputs)
    grams, lengths, error = [], [], gamma(2 * positions + 4)
    for factor in (inputs, outputs):
        gram, of_gram = _gram(factor)
        # Products that underflow are lost. Lengths are enlarged by `least`, so that the error
        # bound, which is relative to the lengths, covers the lost products too.
        least = factor.shape[2] * UNDERFLOW / UNIT
        lengths.append(tf.sqrt(tf.linalg.diag_part(gram) * (1 + 2 * of_gram) + least))
        grams.append(gram)
        error += 1.01 * of_gram
    products = lengths[0] * lengths[1]
    total = tf.reduce_sum(products, 1, keepdims=True) * (1 + gamma(positions))
    # Rows are summed first: the error of one sum over all P^2 terms would grow with P^2.
    by_row = tf.reduce_sum(grams[0] * grams[1], 2) + error * products * total
    squares = tf.maximum(tf.reduce_sum(by_row, 1), 0.0)
    norms = tf.sqrt(squares) + in_sum(positions) * total[:, 0]
    cancels = tf.reduce_any(total[:, 0] > _CANCELS * norms)
    return tf.square(norms) * (1 + gamma(4)), cancels


def _by_row(rows: Tensor, outputs: Tensor) -> Tensor:
    positions = _positions(outputs)
    is_same_row = tf.cast(rows[:, :, None] == rows[:, None, :], tf.float32)
    lengths = tf.sqrt(tf.reduce_sum(tf.square(outputs), 2)) * (1 + gamma(outputs.shape[2]))
    # Each position has the norm of the gradient by its row. Only a row's first position counts.
    sums = tf.sqrt(tf.reduce_sum(tf.square(tf.matmul(is_same_row, outputs)), 2))
    sums *= 1 + gamma(outputs.shape[2])
    magnitudes = tf.linalg.matvec(is_same_row, lengths) * (1 + product_gamma(positions))
    largest = sums + (product_gamma(positions) + gamma(positions + 2)) * magnitudes
    # The first position of a row has no equal position before it.
    is_first = tf.reduce_sum(tf.linalg.band_part(is_same_row, -1, 0), 2) == 1
    squares = tf.where(is_first, tf.square(largest), 0.0)
    return tf.reduce_sum(squares, 1) * (1 + gamma(positions + 4))


def in_sum(positions: Any) -> Any:
    """Bounds the rounding error of an example's part of a weighted sum of products.

    Args:
        positions: The number of products of the example.

    Returns:
        The error's norm over the sum of the products' norms.
    """
    return product_gamma(positions + 4)


def _gram(factor: Tensor) -> tuple[Tensor, Any]:
    """Computes each example's Gram matrix, and bounds its relative error.

    A device that rounds factors gets them in two parts, high and low. It reads the high part
    without rounding, and the product of both low parts, which is left out, bounds the error.
    """
    size, unit = factor.shape[2], factor_unit()
    parts = [factor[:, :, n : n + _CHUNK] for n in range(0, size, _CHUNK)]
    error = gamma(min(size, _CHUNK) + len(parts))
    if not unit:
        grams = [tf.matmul(part, part, transpose_b=True) for part in parts]
        return (grams[0] if len(grams) == 1 else tf.add_n(grams)), error
    grams = []
    for part in parts:
        high = _cut(part, unit)
        mixed = tf.matmul(high, part - high, transpose_b=True)
        grams += [
            tf.matmul(high, high, transpose_b=True),
            mixed,
            tf.linalg.matrix_transpose(mixed),
        ]
    return tf.add_n(grams), 4 * error + 8 * unit**2


def _cut(values: Tensor, unit: float) -> Tensor:
    """Truncates float32 to as many bits as the device reads."""
    mask = {2.0**-11: -(2**13), 2.0**-8: -(2**16)}[unit]
    bits = tf.bitwise.bitwise_and(tf.bitcast(values, tf.int32), tf.constant(mask, tf.int32))
    return tf.bitcast(bits, tf.float32)


def _positions(factor: Tensor) -> Any:
    static = factor.shape[1]
    return static if static is not None else tf.cast(tf.shape(factor)[1], tf.float32)


def _maybe_compiled(function: Callable[..., Any], *factors: Tensor) -> Callable[..., Any]:
    """Returns the function, or its compiled form if that is faster."""
    positions, *sizes = factors[0].shape[1], *(factor.shape[2] for factor in factors)
    if tf.executing_eagerly() or positions is None:
        return function
    is_worth = 2 * positions**2 * sum(sizes) >= _WORTH_COMPILING
    if not is_worth or tf.config.list_logical_devices("GPU"):
        return function
    return _COMPILED[function]


_COMPILED: dict[Callable[..., Any], Callable[..., Any]] = {
    function: tf.function(function, autograph=False, jit_compile=True)
    for function in (_of_products, _by_row)
}
