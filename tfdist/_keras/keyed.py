"""Random numbers as a function of a secret, the draw and the key of a row.

In private training the contribution of a row must not depend on other rows. So its random
numbers must not depend on its position in the batch: without one row, all later rows would
have other positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist._keras.axes import first_of, is_of_other_axes
from tfdist._keras.traces import map_fn

Tensor = Any
_PHILOX = tf.random.Algorithm.PHILOX.value
# Number of random bits in a float from 0 to 1.
FRACTION_BITS = {tf.float16: 10, tf.bfloat16: 7, tf.float32: 23, tf.float64: 52}


@dataclass(frozen=True)
class RowKeys:
    """The keys of a batch's rows, independent of their positions.

    Attributes:
        rows: The key of each row, int64 of shape [rows].
        secret: int64 of shape [2], the same on all replicas.
    """

    rows: Tensor
    secret: Tensor

    def at(self, rows: Tensor) -> RowKeys:
        """Returns the keys of some rows.

        Args:
            rows: Their positions, shape [some].
        """
        return RowKeys(tf.gather(self.rows, rows), self.secret)

    def words(self, shape: Sequence[Any] | Tensor, seed: Tensor, fine: bool = False) -> Tensor:
        """Draws 64 bits for each number of a tensor.

        Each row has its own numbers if the tensor's first axis is as long as the number of
        rows, or, for a batch of unknown size, a multiple of it. An axis of unknown size whose
        size follows from other axes than the first ones of tensors is never the batch.
        Otherwise all rows have the same numbers.

        The number at position j of the row with key k is computed from a[j] * k + b[j]. Philox
        generates a and b. The numbers of any two rows are independent (multiply-shift,
        Dietzfelbinger, "Universal hashing and k-wise independent random variables via integer
        arithmetic without primes", STACS 1996). Two rounds of MurmurHash3's finalizer remove
        the linear relation between three or more rows.

        Args:
            shape: The shape of the tensor.
            seed: The seed of the draw, int32 of shape [2].
            fine: Whether the caller needs the lower 32 bits too.

        Returns:
            uint64 of the shape.
        """
        size, static = _shapes(shape)
        rows = tf.size(self.rows, tf.int64)
        is_by_row = self._is_by_row(shape, size, static, rows)
        # Without an axis of rows there is one key, 0, so all rows get the same numbers.
        keys = tf.where(is_by_row, self.rows[: tf.where(is_by_row, rows, 1)], 0)
        positions = tf.reduce_prod(size) // tf.maximum(tf.size(keys, tf.int64), 1)
        seed_words = tf.bitcast(tf.cast(seed, tf.int32), tf.uint32)
        # One half of the secret is the key of Philox. The other half and the seed of the draw
        # are the upper half of its counter, so draws with different seeds share no bits.
        high = tf.cast(seed_words[0], tf.uint64) * tf.constant(2**32, tf.uint64)
        secret = tf.bitcast(self.secret, tf.uint64)
        high = (high + tf.cast(seed_words[1], tf.uint64)) ^ secret[1]
        factors = tf.raw_ops.StatelessRandomUniformFullIntV2(
            shape=tf.stack([2, tf.cast(positions, tf.int32)]),
            key=secret[:1],
            counter=tf.stack([tf.constant(0, tf.uint64), high]),
            alg=_PHILOX,
            dtype=tf.uint64,
        )
        words = factors[0] * tf.bitcast(keys, tf.uint64)[:, None] + factors[1]
        return tf.ensure_shape(tf.reshape(_mix(words, fine), size), static)

    def _is_by_row(
        self, shape: Any, size: Tensor, static: tf.TensorShape, rows: Tensor
    ) -> Tensor:
        """Returns whether a tensor's first axis is the axis of the batch.

        A size alone does not show it: an axis of positions may be as long as a batch. The
        checks of private training therefore also call a model with a single row, of which
        every size is a multiple.
        """
        if not static.rank:
            return tf.constant(False)
        if static[0] is not None and not tf.executing_eagerly():
            # A static length can be the batch size only if the batch has a static size.
            return tf.constant(static[0] == self.rows.shape[0])
        if static[0] is not None:
            return tf.equal(size[0], rows)
        if not tf.executing_eagerly() and is_of_other_axes(first_of(shape)):
            return tf.constant(False)
        return (size[0] % tf.maximum(rows, 1) == 0) & (size[0] >= rows)

    def fold(self, seed: Tensor, rows: Tensor) -> Tensor:
        """Derives a seed from the seed of a draw and the key of a row.

        Args:
            seed: The seed of the draw, int32 of shape [2].
            rows: The key, a scalar int64.

        Returns:
            int64 of shape [2].
        """
        of_row = RowKeys(rows[None], self.secret)
        words = of_row.words(tf.constant([1, 2], tf.int64), seed, fine=True)[0]
        # 31 bits each: the seeds of stateless draws are int32, and not negative here.
        return tf.cast(tf.bitwise.right_shift(words, tf.constant(33, tf.uint64)), tf.int64)


def row_numbers(data: Any, offset: Tensor, copies: int = 1) -> Tensor:
    """Computes a number for each row from its contents.

    So if a row of the data is removed, added or replaced, all other rows keep their numbers.
    Equal rows have equal numbers.

    Args:
        data: `x`, `(x, y)` or `(x, y, sample_weight)`. Weights are ignored.
        offset: Scalar int64, the position of the first row in the global batch. Ragged and
            sparse inputs have no fingerprint: there the number is the row's position.
        copies: Number of adjacent copies of each row. Copies have different numbers.

    Returns:
        int64 of shape [rows].
    """
    x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
    columns = tf.nest.flatten(x)
    rows = tf.shape(columns[0], tf.int64)[0]
    if any(not isinstance(leaf, tf.Tensor) for leaf in columns):
        return tf.range(rows) + offset
    columns += [leaf for leaf in tf.nest.flatten(y) if leaf is not None]
    number = tf.range(rows) % copies
    for column in columns:
        if not isinstance(column, tf.Tensor):
            continue
        if column.shape.rank == 1:
            column = column[:, None]
        fingerprint = tf.bitcast(tf.fingerprint(column), tf.int64)
        # An odd factor: no bits are lost, and the order of the columns matters.
        number = number * 0x2127599BF4325C37 + fingerprint
    return number


def _shapes(shape: Any) -> tuple[Tensor, tf.TensorShape]:
    """Returns a shape as a tensor, and the static shape."""
    if tf.is_tensor(shape):
        sizes = tf.get_static_value(shape, partial=True)
        sizes = [None] * int(shape.shape[0]) if sizes is None else list(sizes)
        return tf.cast(shape, tf.int64), tf.TensorShape(sizes)
    static = [size if isinstance(size, int | np.integer) else None for size in shape]
    sizes = [tf.cast(size, tf.int64) for size in shape]
    return (tf.stack(sizes) if sizes else tf.zeros([0], tf.int64)), tf.TensorShape(static)


def _mix(words: Tensor, fine: bool) -> Tensor:
    """Applies MurmurHash3's finalizer, or its first half: enough for the upper bits."""

    def xor_shift(words: Tensor, bits: int) -> Tensor:
        return words ^ tf.bitwise.right_shift(words, tf.constant(bits, tf.uint64))

    words = xor_shift(words, 33) * tf.constant(0xFF51AFD7ED558CCD, tf.uint64)
    if not fine:
        return words
    words = xor_shift(words, 33) * tf.constant(0xC4CEB9FE1A85EC53, tf.uint64)
    return xor_shift(words, 33)


def _upper(words: Tensor, bits: int) -> Tensor:
    return tf.bitwise.right_shift(words, tf.constant(64 - bits, tf.uint64))


def is_at_least(
    rate: float, keys: RowKeys, shape: Any, seed: Tensor, dtype: tf.DType
) -> Tensor:
    """Tells where a random number from 0 to 1, in the precision of `dtype`, is at least `rate`.

    Args:
        rate: The bound.
        keys: The rows' keys.
        shape: As in `RowKeys.words`.
        seed: As in `RowKeys.words`.
        dtype: A floating dtype.
    """
    bits = FRACTION_BITS[dtype]
    least = math.ceil(float(np.asarray(rate, dtype.as_numpy_dtype)) * 2**bits)
    words = keys.words(shape, seed, fine=bits > 32)
    return _upper(words, bits) >= tf.constant(least, tf.uint64)


def uniform(keys: RowKeys, shape: Any, seed: Tensor, dtype: tf.DType) -> Tensor:
    """Draws numbers from 0, included, to 1, excluded.

    Args:
        keys: The rows' keys.
        shape: As in `RowKeys.words`.
        seed: As in `RowKeys.words`.
        dtype: A floating dtype.
    """
    bits = FRACTION_BITS[dtype]
    words = keys.words(shape, seed, fine=bits > 32)
    return tf.cast(tf.cast(_upper(words, bits), tf.int64), dtype) * tf.cast(2.0**-bits, dtype)


def normal(keys: RowKeys, shape: Any, seed: Tensor, dtype: tf.DType) -> Tensor:
    """Draws normal numbers of mean 0 and variance 1 (Box and Muller, 1958).

    Args:
        keys: The rows' keys.
        shape: As in `RowKeys.words`.
        seed: As in `RowKeys.words`.
        dtype: A floating dtype.
    """
    words = keys.words(shape, seed, fine=True)
    computed = dtype if dtype == tf.float64 else tf.float32
    low = tf.bitwise.bitwise_and(words, tf.constant(2**32 - 1, tf.uint64))
    first = (tf.cast(tf.cast(_upper(words, 32), tf.int64), computed) + 0.5) * 2.0**-32
    angle = tf.cast(tf.cast(low, tf.int64), computed) * (math.pi * 2.0**-31)
    # The largest value of `first` rounds to 1 in float32. It is valid: the radius is 0.
    return tf.cast(tf.sqrt(-2.0 * tf.math.log(first)) * tf.cos(angle), dtype)


def integers(keys: RowKeys, shape: Any, seed: Tensor, dtype: tf.DType = tf.int64) -> Tensor:
    """Draws whole numbers from 0 to 2**62 - 1.

    Args:
        keys: The rows' keys.
        shape: As in `RowKeys.words`.
        seed: As in `RowKeys.words`.
        dtype: An integer dtype of 64 bits.
    """
    return tf.cast(_upper(keys.words(shape, seed, fine=True), 62), dtype)


def row_by_row(
    draw: Callable[..., Tensor], keys: RowKeys, shape: Any, seed: Tensor, *parameters: Any
) -> Tensor:
    """Draws from any distribution, for one row after the other. It is slow.

    Args:
        draw: A function of a shape, a seed and the parameters.
        keys: The rows' keys.
        shape: As in `RowKeys.words`.
        seed: As in `RowKeys.words`.
        *parameters: Tensors that can be broadcast to `shape`.
    """
    size, static = _shapes(shape)
    rows = tf.size(keys.rows, tf.int64)
    is_by_row = keys._is_by_row(shape, size, static, rows)
    row_keys = tf.where(is_by_row, keys.rows[: tf.where(is_by_row, rows, 1)], 0)
    num_keys = tf.size(row_keys, tf.int64)
    split = tf.concat([[num_keys, -1], size[1:]], 0)
    split = split if static.rank else tf.constant([1, 1], tf.int64)
    by_row = [tf.reshape(tf.broadcast_to(p, size), split) for p in parameters]
    row_shape = tf.concat([[tf.reduce_prod(size[:1]) // num_keys], size[1:]], 0)

    def draw_row(key_and_parameters: Any) -> Tensor:
        key, *row_parameters = key_and_parameters
        return draw(row_shape, tf.cast(keys.fold(seed, key), tf.int32), *row_parameters)

    ones = [tf.ones([1], parameter.dtype) for parameter in by_row]
    dtype = draw(tf.constant([1]), tf.constant([0, 0]), *ones).dtype
    numbers = map_fn(
        draw_row, (row_keys, *by_row), fn_output_signature=tf.TensorSpec(None, dtype)
    )
    return tf.ensure_shape(tf.reshape(numbers, size), static)


BY_OP: dict[Callable[..., Any], Callable[..., Tensor]] = {
    tf.raw_ops.StatelessRandomUniformV2: uniform,
    tf.raw_ops.StatelessRandomNormalV2: normal,
    tf.raw_ops.StatelessRandomUniformFullIntV2: integers,
}
