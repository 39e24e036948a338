"""The losses of single examples, from the compiled loss of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from tfdist import _keras
from tfdist._keras import layers as keras_layers

Tensor = Any


def summed_loss(model: Any, x: Any, y: Any, sample_weight: Any, outputs: Any) -> Tensor:
    """Returns the sum of the examples' losses, each on a batch of this example alone.

    Args:
        model: A compiled, built `keras.Model`.
        x: A batch of inputs.
        y: Targets, or None.
        sample_weight: The sample weights of Keras, or None.
        outputs: The outputs of the model.
    """
    if not is_mean(model, sample_weight, outputs):
        return tf.reduce_sum(losses_alone(model, x, y, sample_weight, outputs))
    examples = tf.shape(tf.nest.flatten(outputs)[0])[0]
    with _loss_itself(model):
        mean = keras_layers.compiled_loss(model, x, y, outputs, sample_weight)
    # The mean of single losses times their number: Keras computes the batch at once, without a
    # loop.
    return mean * tf.cast(examples, mean.dtype)


def losses_alone(model: Any, x: Any, y: Any, sample_weight: Any, outputs: Any) -> Tensor:
    """Computes the compiled loss of each example on a batch of this example alone.

    Regularizers of weights are left out, and no metric is updated. It is a loop, and slow.

    Args:
        model: A compiled, built `keras.Model`.
        x: A batch of inputs, nested as the model takes them.
        y: Targets, or None.
        sample_weight: The sample weights of Keras, or None.
        outputs: The outputs of the model.

    Returns:
        float32 of shape [examples].
    """

    def alone(index: Tensor) -> Tensor:
        def row(leaf: Tensor) -> Tensor:
            one_row = leaf[index : index + 1]
            if keras_layers.has_mask(leaf):
                keras_layers.give_mask(one_row, keras_layers.mask_of(leaf)[index : index + 1])
            return one_row

        one_x, one_y, one_weight = tf.nest.map_structure(
            lambda leaf: (
                leaf if leaf is None else tf.convert_to_tensor(leaf)[index : index + 1]
            ),
            (x, y, sample_weight),
        )
        one_outputs = tf.nest.map_structure(row, outputs)
        # All examples begin with the same seeds. Otherwise the random numbers of an example
        # would depend on how many examples come before it.
        with keras.StatelessScope():
            loss = keras_layers.compiled_loss(model, one_x, one_y, one_outputs, one_weight)
        return tf.cast(loss, tf.float32)

    examples = tf.shape(tf.nest.flatten(outputs)[0])[0]
    with _loss_itself(model):
        return _keras.map_fn(alone, tf.range(examples), fn_output_signature=tf.float32)


@contextlib.contextmanager
def _loss_itself(model: Any) -> Iterator[None]:
    """Computes losses without regularizers, without metrics and without the global batch."""
    with (
        _keras.on_replica(None),
        keras_layers.without_regularizers(model.trainable_variables),
        keras.StatelessScope(),
    ):
        yield


def is_mean(model: Any, sample_weight: Any, outputs: Any) -> bool:
    """Returns whether the compiled loss of a batch is the mean of its examples' losses.

    Args:
        model: A compiled, built `keras.Model`.
        sample_weight: The sample weights of Keras, or None.
        outputs: The outputs of the model.
    """
    if keras_layers.has_own_compute_loss(model):
        return False
    if any(keras_layers.has_mask(output) for output in tf.nest.flatten(outputs)):
        return False
    weighted = sample_weight is not None
    return all(
        keras_layers.is_mean_over_examples(loss, weighted)
        for loss in keras_layers.losses_of(model)
    )
