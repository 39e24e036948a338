"""Random numbers as a function of the example's position in the global batch.

In private training rows have keys. There they are a function of the row's key instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend.tensorflow import random as _random

from tfdist._keras import keyed
from tfdist._keras.keyed import FRACTION_BITS, RowKeys
from tfdist._keras.replica import ReplicaBatch, Tensor, current_batch, seeding

_keras_next = keras.random.SeedGenerator.next
_keras_dropout = _random.dropout
_keras_draw_seed = _random.draw_seed
_keras_normal = _random.normal
_keras_uniform = _random.uniform
_keras_randint = _random.randint
_keras_truncated_normal = _random.truncated_normal
_keras_categorical = _random.categorical
_keras_gamma = _random.gamma
_keras_beta = _random.beta
_keras_binomial = _random.binomial
_PHILOX = tf.random.Algorithm.PHILOX.value


def _drawing_batch() -> ReplicaBatch | None:
    """Returns this replica's batch, but None in an optimizer: its noise is equal everywhere."""
    batch = current_batch()
    return None if batch is None or batch.is_updating else batch


def next_seed(generator: Any, ordered: bool = True) -> Tensor:
    """Advances a seed as Keras does, and notes that its value follows from the value before."""
    with seeding():
        return _keras_next(generator, ordered)


def draw_seed(seed: Any) -> Tensor:
    """Draws a seed that differs between replicas, so that their noise is independent."""
    if tf.is_tensor(seed):
        return seed
    common_seed = _keras_draw_seed(seed)
    batch = _drawing_batch()
    if batch is None:
        return common_seed
    if batch.keys is not None:
        # The same on all replicas. The keys of rows make the numbers of rows differ.
        return common_seed + tf.cast(batch.keys.secret % (2**31 - 1), common_seed.dtype)
    # Keras adds 1 to the second word at each draw. With 7919 for each row before the share,
    # replicas do not meet for thousands of draws.
    offset = tf.cast(batch.offset, common_seed.dtype)
    return common_seed + tf.stack([tf.zeros_like(offset), offset * 7919])


def normal(
    shape: Any, mean: float = 0.0, stddev: float = 1.0, dtype: Any = None, seed: Any = None
) -> Tensor:
    """Draws the share's rows of the numbers that one process would draw for the batch."""
    batch = _drawing_batch()
    dtype = tf.as_dtype(dtype or keras.config.floatx())
    if batch is None or not dtype.is_floating:
        return _keras_normal(shape, mean, stddev, dtype.name, seed)
    if batch.keys is not None:
        numbers = keyed.normal(batch.keys, shape, _seed_of_draw(seed), dtype)
    else:
        numbers = _rows_of_share(batch, shape, dtype, seed, tf.raw_ops.StatelessRandomNormalV2)
    return numbers * tf.cast(stddev, dtype) + tf.cast(mean, dtype)


def uniform(
    shape: Any, minval: float = 0.0, maxval: float = 1.0, dtype: Any = None, seed: Any = None
) -> Tensor:
    """Draws the share's rows of the numbers that one process would draw for the batch."""
    batch = _drawing_batch()
    dtype = tf.as_dtype(dtype or keras.config.floatx())
    if batch is None or not dtype.is_floating:
        return _keras_uniform(shape, minval, maxval, dtype.name, seed)
    if batch.keys is not None:
        numbers = keyed.uniform(batch.keys, shape, _seed_of_draw(seed), dtype)
    else:
        numbers = _rows_of_share(batch, shape, dtype, seed, tf.raw_ops.StatelessRandomUniformV2)
    least = tf.cast(minval, dtype)
    return numbers * (tf.cast(maxval, dtype) - least) + least


def _keys() -> RowKeys | None:
    batch = _drawing_batch()
    return None if batch is None else batch.keys


def _seed_of_draw(seed: Any) -> Tensor:
    return _random._cast_seed(seed if tf.is_tensor(seed) else _keras_draw_seed(seed))


def randint(
    shape: Any, minval: Any, maxval: Any, dtype: Any = "int32", seed: Any = None
) -> Tensor:
    """Draws whole numbers: as Keras does, or by the rows' keys."""
    keys = _keys()
    if keys is None:
        return _keras_randint(shape, minval, maxval, dtype, seed)
    numbers = keyed.integers(keys, shape, _seed_of_draw(seed))
    least = tf.cast(minval, tf.int64)
    return tf.cast(numbers % (tf.cast(maxval, tf.int64) - least) + least, dtype)


def truncated_normal(
    shape: Any, mean: float = 0.0, stddev: float = 1.0, dtype: Any = None, seed: Any = None
) -> Tensor:
    """Draws normal numbers within two deviations: as Keras does, or by the rows' keys."""
    keys = _keys()
    if keys is None:
        return _keras_truncated_normal(shape, mean, stddev, dtype, seed)
    dtype = tf.as_dtype(dtype or keras.config.floatx())
    wide = tf.float64 if dtype == tf.float64 else tf.float32
    uniforms = keyed.uniform(keys, shape, _seed_of_draw(seed), wide)
    # The inverse of the normal distribution function, between its values at -2 and 2.
    numbers = math.sqrt(2.0) * tf.math.erfinv((2.0 * uniforms - 1.0) * math.erf(math.sqrt(2.0)))
    return tf.cast(numbers, dtype) * tf.cast(stddev, dtype) + tf.cast(mean, dtype)


def categorical(
    logits: Tensor, num_samples: Any, dtype: Any = "int64", seed: Any = None
) -> Any:
    """Draws classes: as Keras does, or by the rows' keys."""
    keys = _keys()
    if keys is None:
        return _keras_categorical(logits, num_samples, dtype, seed)
    logits = tf.convert_to_tensor(logits)
    shape = [logits.shape[0] or tf.shape(logits)[0], num_samples, tf.shape(logits)[1]]
    numbers = keyed.uniform(keys, shape, _seed_of_draw(seed), tf.float32)
    # The index of the largest logit with Gumbel noise. The smallest uniform number is 0, whose
    # logarithm is not finite.
    noise = -tf.math.log(-tf.math.log(numbers + 2.0**-24))
    return tf.argmax(tf.cast(logits, tf.float32)[:, None] + noise, -1, tf.as_dtype(dtype))


def gamma(shape: Any, alpha: Any, dtype: Any = None, seed: Any = None) -> Tensor:
    """Draws from gamma distributions: as Keras does, or by the rows' keys."""
    return _draw_by_rows(_keras_gamma, shape, (alpha,), dtype, seed)


def beta(shape: Any, alpha: Any, beta: Any, dtype: Any = None, seed: Any = None) -> Tensor:
    """Draws from beta distributions: as Keras does, or by the rows' keys."""
    return _draw_by_rows(_keras_beta, shape, (alpha, beta), dtype, seed)


def binomial(
    shape: Any, counts: Any, probabilities: Any, dtype: Any = None, seed: Any = None
) -> Tensor:
    """Draws from binomial distributions: as Keras does, or by the rows' keys."""
    return _draw_by_rows(_keras_binomial, shape, (counts, probabilities), dtype, seed)


def _draw_by_rows(
    draw: Callable[..., Tensor], shape: Any, parameters: Any, dtype: Any, seed: Any
) -> Tensor:
    keys = _keys()
    if keys is None:
        return draw(shape, *parameters, dtype, seed)

    def with_seed(shape: Any, seed: Tensor, *row_parameters: Any) -> Tensor:
        return draw(shape, *row_parameters, dtype, seed)

    tensors = [tf.cast(parameter, tf.float32) for parameter in parameters]
    return keyed.row_by_row(with_seed, keys, shape, _seed_of_draw(seed), *tensors)


def _rows_of_share(
    batch: ReplicaBatch, shape: Any, dtype: Any, seed: Any, draw: Callable[..., Tensor]
) -> Tensor:
    """Draws each row's numbers if the first axis has the share's rows, else equal numbers."""
    op_seed = _random._cast_seed(_keras_draw_seed(seed))
    static = tf.TensorShape([size if isinstance(size, int) else None for size in shape])
    size = tf.cast(tf.convert_to_tensor(shape), tf.int64)
    first = tf.constant(0, tf.int64)
    if len(shape):
        local = tf.maximum(batch.rows, 1)
        repeats = size[0] // local
        # A static length must equal the number of rows. Another one may be a multiple of it,
        # as a layer may fold other axes into the first.
        fits = repeats == 1 if static[0] is not None else repeats >= 1
        is_of_share = tf.logical_and(fits, size[0] == repeats * local)
        first = tf.where(is_of_share, batch.offset * repeats, first)
    numbers = uniform_rows(size, first, op_seed, dtype, draw)
    return tf.ensure_shape(numbers, static)


def dropout(inputs: Tensor, rate: float, noise_shape: Any = None, seed: Any = None) -> Tensor:
    """Drops the elements that one process would drop.

    The mask is the share's rows of the global batch's mask. The generator is counter-based,
    so skipping the rows before the share costs nothing.
    """
    if rate in (0.0, 1.0):
        return _keras_dropout(inputs, rate, noise_shape, seed)
    batch = current_batch()
    if batch is not None and batch.keys is not None:
        return _dropout_by_key(batch.keys, inputs, rate, noise_shape, seed)
    # While replicas train, `_random.draw_seed` is the function above, whose seeds differ
    # between replicas. A mask of the global batch needs the common seed.
    next_seed = _random.draw_seed if batch is None else _keras_draw_seed
    op_seed = _random._cast_seed(next_seed(seed))
    dtype = tf.as_dtype(inputs.dtype)
    if batch is not None and batch.columns is not None and noise_shape is None:
        mask = batch.columns.draw(
            lambda shape, first: _is_at_least(rate, shape, first, op_seed, dtype),
            tf.shape(inputs, tf.int64),
        )
        return _apply_mask(inputs, rate, tf.ensure_shape(mask, inputs.shape))
    shape = _random._get_concrete_noise_shape(inputs, noise_shape)
    shape = tf.cast(tf.shape(inputs) if shape is None else shape, tf.int64)
    first = tf.constant(0, tf.int64)
    if batch is not None:
        local = tf.cast(tf.shape(inputs)[0], tf.int64)
        # A layer may have folded other axes into the first. Then an example has several rows.
        repeats = local // tf.maximum(batch.rows, 1)
        first = tf.where(shape[0] == local, batch.offset * repeats, first)
    mask = _is_at_least(rate, shape, first, op_seed, dtype)
    return _apply_mask(inputs, rate, mask)


def _dropout_by_key(
    keys: RowKeys, inputs: Tensor, rate: float, noise_shape: Any, seed: Any
) -> Tensor:
    inputs = tf.convert_to_tensor(inputs)
    sizes = tf.shape(inputs, tf.int64)
    noise_sizes = [None] * len(inputs.shape) if noise_shape is None else noise_shape
    shape = [
        size if size is not None else static if static is not None else sizes[axis]
        for axis, (size, static) in enumerate(zip(noise_sizes, inputs.shape, strict=True))
    ]
    dtype = tf.as_dtype(inputs.dtype)
    mask = keyed.is_at_least(rate, keys, shape, _seed_of_draw(seed), dtype)
    return _apply_mask(inputs, rate, mask)


def _apply_mask(inputs: Tensor, rate: float, mask: Tensor) -> Tensor:
    scaled = inputs * tf.constant(1.0 / (1.0 - rate), inputs.dtype)
    return tf.where(mask, scaled, tf.zeros_like(scaled))


def _is_at_least(
    rate: float, shape: Tensor, first: Tensor, seed: Tensor, dtype: tf.DType
) -> Tensor:
    """Tells where the numbers of `uniform_rows` are at least `rate`, with or without XLA.

    It compares bits, not floats: XLA converts the same bits to other floats than TensorFlow's
    kernels do. Keras uses XLA in a single process on a GPU, whose mask would differ otherwise.
    """
    bits = FRACTION_BITS[dtype]
    int_dtype = tf.uint64 if dtype == tf.float64 else tf.uint32
    words = uniform_rows(
        shape, first, seed, int_dtype, tf.raw_ops.StatelessRandomUniformFullIntV2
    )
    if dtype == tf.float64:  # TensorFlow's kernel uses the first half as the upper one
        half = tf.constant(32, int_dtype)
        words = tf.bitwise.left_shift(words, half) | tf.bitwise.right_shift(words, half)
    fraction = tf.bitwise.bitwise_and(words, tf.constant(2**bits - 1, int_dtype))
    least = math.ceil(float(np.asarray(rate, dtype.as_numpy_dtype)) * 2**bits)
    return fraction >= tf.constant(least, int_dtype)


def uniform_rows(
    shape: Tensor,
    first: Tensor,
    seed: Tensor,
    dtype: Any,
    draw: Callable[..., Tensor] = tf.raw_ops.StatelessRandomUniformV2,
) -> Tensor:
    """Computes rows [first, first + shape[0]) of `tf.random.stateless_uniform`.

    Philox converts each value of its counter into 128 bits (Salmon et al., "Parallel random
    numbers: as easy as 1, 2, 3", SC 2011). TensorFlow makes 4 floats or 2 doubles from them.
    `draw` may be another op with the same count, such as StatelessRandomNormalV2.
    """
    per_count = 2 if tf.as_dtype(dtype).size == 8 else 4
    elements, start = tf.reduce_prod(shape), first * tf.reduce_prod(shape[1:])
    # The share may begin within the numbers of one count. Those before it are cut off.
    skipped = start % per_count
    key, counter = tf.raw_ops.StatelessRandomGetKeyCounter(seed=seed)
    counter += tf.stack([tf.cast(start // per_count, tf.uint64), tf.constant(0, tf.uint64)])
    numbers = draw(
        shape=[elements + per_count - 1], key=key, counter=counter, alg=_PHILOX, dtype=dtype
    )
    return tf.reshape(tf.slice(numbers, [skipped], [elements]), shape)
