"""Random numbers as a function of the example's place in the global batch.

Where rows have keys, in private training, they are a function of the row's key instead.
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
from tfdist._keras.replica import ReplicaBatch, Tensor, current_batch

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
    """Gives the share that draws; an optimizer's noise is the same on all replicas."""
    batch = current_batch()
    return None if batch is None or batch.is_updating else batch


def draw_seed(seed: Any) -> Tensor:
    """Draws a seed that differs between replicas, so that their noise is independent."""
    if tf.is_tensor(seed):
        return seed
    drawn = _keras_draw_seed(seed)
    batch = _drawing_batch()
    if batch is None:
        return drawn
    if batch.keys is not None:
        return drawn + tf.cast(batch.keys.secret % (2**31 - 1), drawn.dtype)
    offset = tf.cast(batch.offset, drawn.dtype)
    return drawn + tf.stack([tf.zeros_like(offset), offset * 7919])


def normal(
    shape: Any, mean: float = 0.0, stddev: float = 1.0, dtype: Any = None, seed: Any = None
) -> Tensor:
    """Draws what one process would draw: of the rows of a batch, those of the share."""
    batch = _drawing_batch()
    dtype = tf.as_dtype(dtype or keras.config.floatx())
    if batch is None or not dtype.is_floating:
        return _keras_normal(shape, mean, stddev, dtype.name, seed)
    if batch.keys is not None:
        drawn = keyed.normal(batch.keys, shape, _seed_of_draw(seed), dtype)
    else:
        drawn = _rows_of_share(batch, shape, dtype, seed, tf.raw_ops.StatelessRandomNormalV2)
    return drawn * tf.cast(stddev, dtype) + tf.cast(mean, dtype)


def uniform(
    shape: Any, minval: float = 0.0, maxval: float = 1.0, dtype: Any = None, seed: Any = None
) -> Tensor:
    """Draws what one process would draw: of the rows of a batch, those of the share."""
    batch = _drawing_batch()
    dtype = tf.as_dtype(dtype or keras.config.floatx())
    if batch is None or not dtype.is_floating:
        return _keras_uniform(shape, minval, maxval, dtype.name, seed)
    if batch.keys is not None:
        drawn = keyed.uniform(batch.keys, shape, _seed_of_draw(seed), dtype)
    else:
        drawn = _rows_of_share(batch, shape, dtype, seed, tf.raw_ops.StatelessRandomUniformV2)
    least = tf.cast(minval, dtype)
    return drawn * (tf.cast(maxval, dtype) - least) + least


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
    drawn = keyed.integers(keys, shape, _seed_of_draw(seed))
    least = tf.cast(minval, tf.int64)
    return tf.cast(drawn % (tf.cast(maxval, tf.int64) - least) + least, dtype)


def truncated_normal(
    shape: Any, mean: float = 0.0, stddev: float = 1.0, dtype: Any = None, seed: Any = None
) -> Tensor:
    """Draws normal numbers within two deviations: as Keras does, or by the rows' keys."""
    keys = _keys()
    if keys is None:
        return _keras_truncated_normal(shape, mean, stddev, dtype, seed)
    dtype = tf.as_dtype(dtype or keras.config.floatx())
    wide = tf.float64 if dtype == tf.float64 else tf.float32
    drawn = keyed.uniform(keys, shape, _seed_of_draw(seed), wide)
    # The inverse of the normal distribution's function, between its values at -2 and 2.
    drawn = math.sqrt(2.0) * tf.math.erfinv((2.0 * drawn - 1.0) * math.erf(math.sqrt(2.0)))
    return tf.cast(drawn, dtype) * tf.cast(stddev, dtype) + tf.cast(mean, dtype)


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
    # The largest of logits with Gumbel noise; the least uniform number is 0.
    noise = -tf.math.log(-tf.math.log(numbers + 2.0**-24))
    return tf.argmax(tf.cast(logits, tf.float32)[:, None] + noise, -1, tf.as_dtype(dtype))


def gamma(shape: Any, alpha: Any, dtype: Any = None, seed: Any = None) -> Tensor:
    """Draws from gamma distributions: as Keras does, or by the rows' keys."""
    return _slowly(_keras_gamma, shape, (alpha,), dtype, seed)


def beta(shape: Any, alpha: Any, beta: Any, dtype: Any = None, seed: Any = None) -> Tensor:
    """Draws from beta distributions: as Keras does, or by the rows' keys."""
    return _slowly(_keras_beta, shape, (alpha, beta), dtype, seed)


def binomial(
    shape: Any, counts: Any, probabilities: Any, dtype: Any = None, seed: Any = None
) -> Tensor:
    """Draws from binomial distributions: as Keras does, or by the rows' keys."""
    return _slowly(_keras_binomial, shape, (counts, probabilities), dtype, seed)


def _slowly(
    draw: Callable[..., Tensor], shape: Any, parameters: Any, dtype: Any, seed: Any
) -> Tensor:
    keys = _keys()
    if keys is None:
        return draw(shape, *parameters, dtype, seed)

    def with_seed(shape: Any, seed: Tensor, *own: Any) -> Tensor:
        return draw(shape, *own, dtype, seed)

    given = [tf.cast(parameter, tf.float32) for parameter in parameters]
    return keyed.row_by_row(with_seed, keys, shape, _seed_of_draw(seed), *given)


def _rows_of_share(
    batch: ReplicaBatch, shape: Any, dtype: Any, seed: Any, draw: Callable[..., Tensor]
) -> Tensor:
    """Draws numbers by row where there are as many as the share has; else the same for all."""
    drawn = _random._cast_seed(_keras_draw_seed(seed))
    static = tf.TensorShape([size if isinstance(size, int) else None for size in shape])
    whole = tf.cast(tf.convert_to_tensor(shape), tf.int64)
    first = tf.constant(0, tf.int64)
    if len(shape):
        local = tf.maximum(batch.rows, 1)
        repeats = whole[0] // local
        # A number that was written down is the share's only if it is the very same one.
        fits = repeats == 1 if static[0] is not None else repeats >= 1
        is_of_share = tf.logical_and(fits, whole[0] == repeats * local)
        first = tf.where(is_of_share, batch.offset * repeats, first)
    numbers = uniform_rows(whole, first, drawn, dtype, draw)
    return tf.ensure_shape(numbers, static)


def dropout(inputs: Tensor, rate: float, noise_shape: Any = None, seed: Any = None) -> Tensor:
    """Drops what one process would drop: noise for the global batch, the share's rows of it.

    The generator is counter-based, so the rows before the share cost nothing.
    """
    if rate in (0.0, 1.0):
        return _keras_dropout(inputs, rate, noise_shape, seed)
    batch = current_batch()
    if batch is not None and batch.keys is not None:
        return _dropout_by_key(batch.keys, inputs, rate, noise_shape, seed)
    draw = _random.draw_seed if batch is None else _keras_draw_seed
    drawn = _random._cast_seed(draw(seed))
    shape = _random._get_concrete_noise_shape(inputs, noise_shape)
    shape = tf.cast(tf.shape(inputs) if shape is None else shape, tf.int64)
    first = tf.constant(0, tf.int64)
    if batch is not None:
        local = tf.cast(tf.shape(inputs)[0], tf.int64)
        # A layer may have folded other axes into the first: so many positions an example has.
        repeats = local // tf.maximum(batch.rows, 1)
        first = tf.where(shape[0] == local, batch.offset * repeats, first)
    is_kept = _is_at_least(rate, shape, first, drawn, tf.as_dtype(inputs.dtype))
    return _kept(inputs, rate, is_kept)


def _dropout_by_key(
    keys: RowKeys, inputs: Tensor, rate: float, noise_shape: Any, seed: Any
) -> Tensor:
    inputs = tf.convert_to_tensor(inputs)
    sizes = tf.shape(inputs, tf.int64)
    asked = [None] * len(inputs.shape) if noise_shape is None else noise_shape
    shape = [
        size if size is not None else known if known is not None else sizes[axis]
        for axis, (size, known) in enumerate(zip(asked, inputs.shape, strict=True))
    ]
    dtype = tf.as_dtype(inputs.dtype)
    is_kept = keyed.is_at_least(rate, keys, shape, _seed_of_draw(seed), dtype)
    return _kept(inputs, rate, is_kept)


def _kept(inputs: Tensor, rate: float, is_kept: Tensor) -> Tensor:
    scaled = inputs * tf.constant(1.0 / (1.0 - rate), inputs.dtype)
    return tf.where(is_kept, scaled, tf.zeros_like(scaled))


def _is_at_least(
    rate: float, shape: Tensor, first: Tensor, seed: Tensor, dtype: tf.DType
) -> Tensor:
    """Tells where what `uniform_rows` gives is `rate` or more, compiled by XLA or not.

    Of the same bits XLA makes other floats than TensorFlow's kernels do, so that one process
    on a GPU, which Keras compiles, would drop other numbers: what is compared are the bits.
    """
    bits = FRACTION_BITS[dtype]
    whole = tf.uint64 if dtype == tf.float64 else tf.uint32
    drawn = uniform_rows(shape, first, seed, whole, tf.raw_ops.StatelessRandomUniformFullIntV2)
    if dtype == tf.float64:  # TensorFlow's kernel takes the first half for the upper one
        half = tf.constant(32, whole)
        drawn = tf.bitwise.left_shift(drawn, half) | tf.bitwise.right_shift(drawn, half)
    fraction = tf.bitwise.bitwise_and(drawn, tf.constant(2**bits - 1, whole))
    least = math.ceil(float(np.asarray(rate, dtype.as_numpy_dtype)) * 2**bits)
    return fraction >= tf.constant(least, whole)


def uniform_rows(
    shape: Tensor,
    first: Tensor,
    seed: Tensor,
    dtype: Any,
    draw: Callable[..., Tensor] = tf.raw_ops.StatelessRandomUniformV2,
) -> Tensor:
    """Computes rows [first, first + shape[0]) of `tf.random.stateless_uniform`.

    Philox turns each value of its counter into 128 bits (Salmon et al., "Parallel random
    numbers: as easy as 1, 2, 3", SC 2011), which TensorFlow makes 4 floats or 2 doubles.
    `draw` may be another op that makes as many of them, such as StatelessRandomNormalV2.
    """
    per_count = 2 if tf.as_dtype(dtype).size == 8 else 4
    elements, start = tf.reduce_prod(shape), first * tf.reduce_prod(shape[1:])
    skipped = start % per_count
    key, counter = tf.raw_ops.StatelessRandomGetKeyCounter(seed=seed)
    counter += tf.stack([tf.cast(start // per_count, tf.uint64), tf.constant(0, tf.uint64)])
    numbers = draw(
        shape=[elements + per_count - 1], key=key, counter=counter, alg=_PHILOX, dtype=dtype
    )
    return tf.reshape(tf.slice(numbers, [skipped], [elements]), shape)
