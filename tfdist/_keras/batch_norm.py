"""BatchNormalization over the global batch."""

from __future__ import annotations

import functools
from typing import Any

import keras
import tensorflow as tf

from tfdist._keras.replica import Tensor, current_batch

_keras_moments = keras.layers.BatchNormalization._moments


def moments(layer: Any, inputs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Computes moments over the global batch in one collective, without padding rows.

    The sums are of x - moving_mean, which is the same on every replica. Without the shift,
    E[x^2] - E[x]^2 would lose precision by cancellation.
    """
    batch = current_batch()
    if batch is None or not layer.synchronized:
        of_rows = functools.partial(_keras_moments, layer, inputs, mask)
        result: tuple[Tensor, Tensor] = of_rows() if batch is None else batch.of_whole(of_rows)
        return result
    axes = layer._reduction_axes
    shape = [1] * len(inputs.shape)
    shape[layer.axis] = inputs.shape[layer.axis]
    shift = tf.stop_gradient(tf.reshape(tf.cast(layer.moving_mean, inputs.dtype), shape))
    weights = tf.ones_like(inputs)
    if mask is not None:
        weights *= tf.cast(tf.expand_dims(mask, -1), inputs.dtype)
    weights *= tf.cast(batch.has_rows, inputs.dtype)
    shifted = tf.where(weights > 0, inputs - shift, 0.0)
    sums = tf.stack(
        [
            tf.reduce_sum(shifted, axes),
            tf.reduce_sum(tf.square(shifted), axes),
            tf.reduce_sum(weights, axes),
        ]
    )
    (reduced,) = batch.all_reduce([sums])
    first, second, count = tf.unstack(reduced)
    if mask is not None:
        count += keras.config.epsilon()  # as in Keras's masked moments
    first, second = (
        tf.math.divide_no_nan(first, count),
        tf.math.divide_no_nan(second, count),
    )
    # Rounding may make it negative.
    variance = tf.maximum(second - tf.square(first), 0.0)
    # An empty global batch must not change the moving statistics.
    moving = tf.cast(layer.moving_variance, variance.dtype)
    variance = tf.where(batch.total > 0, variance, moving)
    return first + tf.reshape(shift, [-1]), variance


def synchronized_variables(model: Any) -> set[int]:
    """Collects the ids of variables to which all replicas assign the same value anyway.

    Args:
        model: A `keras.Model`.

    Returns:
        Ids of the moving statistics of BatchNormalization layers with
        `synchronized=True`.
    """
    return {
        id(variable)
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization) and layer.synchronized
        for variable in layer.non_trainable_variables
    }
