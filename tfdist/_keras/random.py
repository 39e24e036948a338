"""Random numbers as a function of the example's place in the global batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend.tensorflow import random as _random

from tfdist._keras.replica import ReplicaBatch, Tensor, current_batch

_keras_dropout = _random.dropout
_keras_draw_seed = _random.draw_seed
_keras_normal = _random.normal
_keras_uniform = _random.uniform
_PHILOX = tf.random.Algorithm.PHILOX.value
# So many of a number's bits make a float from 0 to 1.
_FRACTION_BITS = {tf.float16: 10, tf.bfloat16: 7, tf.float32: 23, tf.float64: 52}


def _drawing_batch() -> ReplicaBatch | None:
    """Gives the share that draws; an optimizer's noise is the same on all replicas."""
    batch = current_batch()
    return None if batch is None or batch.is_updating else batch


def draw_seed(seed: Any) -> Tensor:
    """Draws a seed that differs between replicas, so that their noise is independent."""
    drawn = _keras_draw_seed(seed)
    batch = _drawing_batch()
    if batch is None:
        return drawn
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
    drawn = _rows_of_share(batch, shape, dtype, seed, tf.raw_ops.StatelessRandomUniformV2)
    least = tf.cast(minval, dtype)
    return drawn * (tf.cast(maxval, dtype) - least) + least


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
    scaled = inputs * tf.constant(1.0 / (1.0 - rate), inputs.dtype)
    return tf.where(is_kept, scaled, tf.zeros_like(scaled))


def _is_at_least(
    rate: float, shape: Tensor, first: Tensor, seed: Tensor, dtype: tf.DType
) -> Tensor:
    """Tells where what `uniform_rows` gives is `rate` or more, compiled by XLA or not.

    Of the same bits XLA makes other floats than TensorFlow's kernels do, so that one process
    on a GPU, which Keras compiles, would drop other numbers: what is compared are the bits.
    """
    bits = _FRACTION_BITS[dtype]
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
