"""Squared norms from Gram matrices, compiled where that is faster, and never too small.

The gradients at two positions of a sequence may cancel, and what is left may be smaller than
the rounding errors of the Gram matrices. So each norm is enlarged by the most that rounding
can have taken from it, and by what it can add to the sum that the gradient goes into.

On processors XLA multiplies a batch of small matrices 2 to 3 times as fast as TensorFlow's
`BatchMatMul`, and keeps no product (docs/privacy.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tfdist.privacy.mechanism.rounding import UNDERFLOW, UNIT, factor_unit, gamma, product_gamma

Tensor = Any
# Operations for an example. XLA takes some 0.1 s for each shape that it meets.
_WORTH_COMPILING = 2**20
_CHUNK = 512  # columns that are multiplied at once: errors grow with their number


def squared_norms_of_products(inputs: Tensor, outputs: Tensor) -> Tensor:
    """Gives the squared Frobenius norm of each example's inputs^T outputs, or a little more.

    With Gram matrices of P positions, p and q columns and S = sum_t |inputs_t| |outputs_t|,
    the computed square differs from the exact one by at most (g(p) + g(q) + g(2 P)) S^2, where
    g(n) is about n * 2^-24. That is added. Where positions do not cancel, S is at most
    sqrt(P) norms, and the norm becomes larger by about (p + q + 2 P) P * 2^-25 of itself:
    0.15 % for 64 positions of 128 and 512 numbers.

    Args:
        inputs: float32 of shape [examples, positions, p].
        outputs: float32 of shape [examples, positions, q].

    Returns:
        float32 of shape [examples].
    """
    return _chosen(_of_products, inputs, outputs)(inputs, outputs)


def squared_norms_by_row(rows: Tensor, outputs: Tensor) -> Tensor:
    """Gives the squared norm of each example's outputs added up by row, or a little more.

    Args:
        rows: Integers of shape [examples, positions].
        outputs: float32 of shape [examples, positions, q].

    Returns:
        float32 of shape [examples].
    """
    return _chosen(_by_row, outputs)(rows, outputs)


def _of_products(inputs: Tensor, outputs: Tensor) -> Tensor:
    positions = _positions(inputs)
    grams, lengths, error = [], [], gamma(2 * positions + 4)
    for factor in (inputs, outputs):
        gram, of_gram = _gram(factor)
        # What underflows is within the error of lengths that are as much larger.
        least = factor.shape[2] * UNDERFLOW / UNIT
        lengths.append(tf.sqrt(tf.linalg.diag_part(gram) * (1 + 2 * of_gram) + least))
        grams.append(gram)
        error += 1.01 * of_gram
    products = lengths[0] * lengths[1]
    whole = tf.reduce_sum(products, 1, keepdims=True) * (1 + gamma(positions))
    # By rows first: a sum of all at once would have an error of the square of the positions.
    by_row = tf.reduce_sum(grams[0] * grams[1], 2) + error * products * whole
    squares = tf.maximum(tf.reduce_sum(by_row, 1), 0.0)
    return tf.square(tf.sqrt(squares) + in_sum(positions) * whole[:, 0]) * (1 + gamma(4))


def _by_row(rows: Tensor, outputs: Tensor) -> Tensor:
    positions = _positions(outputs)
    same = tf.cast(rows[:, :, None] == rows[:, None, :], tf.float32)
    lengths = tf.sqrt(tf.reduce_sum(tf.square(outputs), 2)) * (1 + gamma(outputs.shape[2]))
    # The gradient itself, at each position that of its row; the first of a row counts.
    sums = tf.sqrt(tf.reduce_sum(tf.square(tf.matmul(same, outputs)), 2))
    sums *= 1 + gamma(outputs.shape[2])
    magnitudes = tf.linalg.matvec(same, lengths) * (1 + product_gamma(positions))
    largest = sums + (product_gamma(positions) + gamma(positions + 2)) * magnitudes
    is_first = tf.reduce_sum(tf.linalg.band_part(same, -1, 0), 2) == 1
    squares = tf.where(is_first, tf.square(largest), 0.0)
    return tf.reduce_sum(squares, 1) * (1 + gamma(positions + 4))


def in_sum(positions: Any) -> Any:
    """Bounds the error of an example's part of a weighted sum of products.

    Args:
        positions: How many products the example has.

    Returns:
        The error's norm over the sum of the products' norms.
    """
    return product_gamma(positions + 4)


def _gram(factor: Tensor) -> tuple[Tensor, Any]:
    """Multiplies each example's factor by itself, and bounds the error.

    Factors that the device would round are split in two that it need not: the error is then
    that of the product of what is left.
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
    """Rounds float32 down to so few bits that the device takes them as they are."""
    kept = {2.0**-11: -(2**13), 2.0**-8: -(2**16)}[unit]
    bits = tf.bitwise.bitwise_and(tf.bitcast(values, tf.int32), tf.constant(kept, tf.int32))
    return tf.bitcast(bits, tf.float32)


def _positions(factor: Tensor) -> Any:
    known = factor.shape[1]
    return known if known is not None else tf.cast(tf.shape(factor)[1], tf.float32)


def _chosen(function: Callable[..., Tensor], *factors: Tensor) -> Callable[..., Tensor]:
    """Gives the function, or what XLA makes of it."""
    positions, *sizes = factors[0].shape[1], *(factor.shape[2] for factor in factors)
    if tf.executing_eagerly() or positions is None:
        return function
    is_worth = 2 * positions**2 * sum(sizes) >= _WORTH_COMPILING
    if not is_worth or tf.config.list_logical_devices("GPU"):
        return function
    return _COMPILED[function]


_COMPILED: dict[Callable[..., Tensor], Callable[..., Tensor]] = {
    function: tf.function(function, autograph=False, jit_compile=True)
    for function in (_of_products, _by_row)
}
