"""Random numbers as a function of a secret, the draw and the row that they are for.

In private training what a row contributes must depend on no other row, so its numbers may
not follow from its place in the batch: a row that is left out would move those after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist._keras.traces import map_fn

Tensor = Any
_PHILOX = tf.random.Algorithm.PHILOX.value
# So many of a number's bits make a float from 0 to 1.
FRACTION_BITS = {tf.float16: 10, tf.bfloat16: 7, tf.float32: 23, tf.float64: 52}


@dataclass(frozen=True)
class RowKeys:
    """What tells the rows of a batch apart, wherever in it they are.

    Attributes:
        rows: A number for each row, int64 of shape [rows].
        secret: int64 of shape [2], the same on all replicas.
    """

    rows: Tensor
    secret: Tensor

    def at(self, rows: Tensor) -> RowKeys:
        """Gives the keys of some rows.

        Args:
            rows: Their places, shape [some].
        """
        return RowKeys(tf.gather(self.rows, rows), self.secret)

    def words(self, shape: Sequence[Any] | Tensor, seed: Tensor, fine: bool = False) -> Tensor:
        """Draws 64 bits for each number of a tensor.

        Where a tensor's first axis has as many places as there are rows, or a multiple of it
        in a batch of any size, each row has its own numbers; else all rows have the same.

        A number at position j of the row with key k is made from a[j] * k + b[j], with a and b
        from Philox: for one row, and for any two, independent (multiply-shift, Dietzfelbinger,
        "Universal hashing and k-wise independent random variables via integer arithmetic
        without primes", STACS 1996). Two rounds of MurmurHash3's finalizer take the linear
        relation from three and more rows.

        Args:
            shape: Of the tensor.
            seed: Of the draw, int32 of shape [2].
            fine: Whether the lower 32 bits are needed too.

        Returns:
            uint64 of the shape.
        """
        whole, static = _shapes(shape)
        rows = tf.size(self.rows, tf.int64)
        is_by_row = self._is_by_row(whole, static, rows)
        keys = tf.where(is_by_row, self.rows[: tf.where(is_by_row, rows, 1)], 0)
        positions = tf.reduce_prod(whole) // tf.maximum(tf.size(keys, tf.int64), 1)
        with_seed = tf.bitcast(tf.cast(seed, tf.int32), tf.uint32)
        high = tf.cast(with_seed[0], tf.uint64) * tf.constant(2**32, tf.uint64)
        secret = tf.bitcast(self.secret, tf.uint64)
        high = (high + tf.cast(with_seed[1], tf.uint64)) ^ secret[1]
        factors = tf.raw_ops.StatelessRandomUniformFullIntV2(
            shape=tf.stack([2, tf.cast(positions, tf.int32)]),
            key=secret[:1],
            counter=tf.stack([tf.constant(0, tf.uint64), high]),
            alg=_PHILOX,
            dtype=tf.uint64,
        )
        words = factors[0] * tf.bitcast(keys, tf.uint64)[:, None] + factors[1]
        return tf.ensure_shape(tf.reshape(_mixed(words, fine), whole), static)

    def _is_by_row(self, whole: Tensor, static: tf.TensorShape, rows: Tensor) -> Tensor:
        """Says whether a tensor's first axis is that of the batch."""
        if not static.rank:
            return tf.constant(False)
        if static[0] is not None and not tf.executing_eagerly():
            # A number that was written down is the batch's only if that was, too.
            return tf.constant(static[0] == self.rows.shape[0])
        if static[0] is not None:
            return tf.equal(whole[0], rows)
        return (whole[0] % tf.maximum(rows, 1) == 0) & (whole[0] >= rows)

    def fold(self, seed: Tensor, rows: Tensor) -> Tensor:
        """Makes a seed of a draw's and a row's key.

        Args:
            seed: Of the draw, int32 of shape [2].
            rows: The key, a scalar int64.

        Returns:
            int64 of shape [2].
        """
        one = RowKeys(rows[None], self.secret)
        words = one.words(tf.constant([1, 2], tf.int64), seed, fine=True)[0]
        return tf.cast(tf.bitwise.right_shift(words, tf.constant(33, tf.uint64)), tf.int64)


def row_numbers(data: Any, offset: Tensor, copies: int = 1) -> Tensor:
    """Gives each row a number that follows from its contents alone.

    So the numbers of other rows stay as they are when a row is left out of the data, added
    or replaced. Equal rows have equal numbers.

    Args:
        data: `x`, `(x, y)` or `(x, y, sample_weight)`; weights do not count.
        offset: Scalar int64, the place of the first row in the global batch: where contents
            cannot be summed up (ragged and sparse inputs), rows are told apart by their place.
        copies: How often each row comes, one behind the other; copies are told apart.

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
        found = tf.bitcast(tf.fingerprint(column), tf.int64)
        number = number * 0x2127599BF4325C37 + found
    return number


def _shapes(shape: Any) -> tuple[Tensor, tf.TensorShape]:
    """Gives a shape as a tensor, and what is known of it."""
    if tf.is_tensor(shape):
        known = tf.get_static_value(shape, partial=True)
        known = [None] * int(shape.shape[0]) if known is None else list(known)
        return tf.cast(shape, tf.int64), tf.TensorShape(known)
    static = [size if isinstance(size, int | np.integer) else None for size in shape]
    sizes = [tf.cast(size, tf.int64) for size in shape]
    return (tf.stack(sizes) if sizes else tf.zeros([0], tf.int64)), tf.TensorShape(static)


def _mixed(words: Tensor, fine: bool) -> Tensor:
    def shifted(words: Tensor, bits: int) -> Tensor:
        return words ^ tf.bitwise.right_shift(words, tf.constant(bits, tf.uint64))

    words = shifted(words, 33) * tf.constant(0xFF51AFD7ED558CCD, tf.uint64)
    if not fine:
        return words
    words = shifted(words, 33) * tf.constant(0xC4CEB9FE1A85EC53, tf.uint64)
    return shifted(words, 33)


def _upper(words: Tensor, bits: int) -> Tensor:
    return tf.bitwise.right_shift(words, tf.constant(64 - bits, tf.uint64))


def is_at_least(
    rate: float, keys: RowKeys, shape: Any, seed: Tensor, dtype: tf.DType
) -> Tensor:
    """Tells where a number from 0 to 1 is `rate` or more, as fine as `dtype` is.

    Args:
        rate: The bound.
        keys: Of the rows.
        shape: As in `RowKeys.words`.
        seed: As in `RowKeys.words`.
        dtype: A floating dtype.
    """
    bits = FRACTION_BITS[dtype]
    least = math.ceil(float(np.asarray(rate, dtype.as_numpy_dtype)) * 2**bits)
    words = keys.words(shape, seed, fine=bits > 32)
    return _upper(words, bits) >= tf.constant(least, tf.uint64)


def uniform(keys: RowKeys, shape: Any, seed: Tensor, dtype: tf.DType) -> Tensor:
    """Draws numbers from 0, included, to 1.

    Args:
        keys: Of the rows.
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
        keys: Of the rows.
        shape: As in `RowKeys.words`.
        seed: As in `RowKeys.words`.
        dtype: A floating dtype.
    """
    words = keys.words(shape, seed, fine=True)
    computed = dtype if dtype == tf.float64 else tf.float32
    low = tf.bitwise.bitwise_and(words, tf.constant(2**32 - 1, tf.uint64))
    first = (tf.cast(tf.cast(_upper(words, 32), tf.int64), computed) + 0.5) * 2.0**-32
    angle = tf.cast(tf.cast(low, tf.int64), computed) * (math.pi * 2.0**-31)
    # Rounded to float32 the largest of them would be 1, which is no harm: the radius is 0.
    return tf.cast(tf.sqrt(-2.0 * tf.math.log(first)) * tf.cos(angle), dtype)


def integers(keys: RowKeys, shape: Any, seed: Tensor, dtype: tf.DType = tf.int64) -> Tensor:
    """Draws whole numbers from 0 to 2**62 - 1.

    Args:
        keys: Of the rows.
        shape: As in `RowKeys.words`.
        seed: As in `RowKeys.words`.
        dtype: Has room for them.
    """
    return tf.cast(_upper(keys.words(shape, seed, fine=True), 62), dtype)


def row_by_row(
    draw: Callable[..., Tensor], keys: RowKeys, shape: Any, seed: Tensor, *parameters: Any
) -> Tensor:
    """Draws from a distribution for one row after the other: exact for any, and slow.

    Args:
        draw: Takes a shape, a seed and the parameters.
        keys: Of the rows.
        shape: As in `RowKeys.words`.
        seed: As in `RowKeys.words`.
        *parameters: Tensors that can be broadcast to `shape`.
    """
    whole, static = _shapes(shape)
    rows = tf.size(keys.rows, tf.int64)
    is_by_row = keys._is_by_row(whole, static, rows)
    used = tf.where(is_by_row, keys.rows[: tf.where(is_by_row, rows, 1)], 0)
    split = tf.concat([[tf.size(used, tf.int64), -1], whole[1:]], 0)
    split = split if static.rank else tf.constant([1, 1], tf.int64)
    given = [tf.reshape(tf.broadcast_to(p, whole), split) for p in parameters]
    of_row = tf.concat([[tf.reduce_prod(whole[:1]) // tf.size(used, tf.int64)], whole[1:]], 0)

    def one(row: Any) -> Tensor:
        key, *own = row
        return draw(of_row, tf.cast(keys.fold(seed, key), tf.int32), *own)

    probe = draw(tf.constant([1]), tf.constant([0, 0]), *(tf.ones([1], p.dtype) for p in given))
    drawn = map_fn(one, (used, *given), fn_output_signature=tf.TensorSpec(None, probe.dtype))
    return tf.ensure_shape(tf.reshape(drawn, whole), static)


BY_OP: dict[Callable[..., Any], Callable[..., Tensor]] = {
    tf.raw_ops.StatelessRandomUniformV2: uniform,
    tf.raw_ops.StatelessRandomNormalV2: normal,
    tf.raw_ops.StatelessRandomUniformFullIntV2: integers,
}
