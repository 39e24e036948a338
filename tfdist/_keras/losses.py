"""Losses of a share, scaled so that their sum over replicas is the loss of the batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from keras.src.losses import loss as _loss
from keras.src.trainers.compile_utils import CompileLoss as _CompileLoss

from tfdist._keras.interception import Method, Replacement, in_family
from tfdist._keras.means import is_mean
from tfdist._keras.replica import Tensor, current_batch

_keras_reduce_weighted_values = _loss.reduce_weighted_values


def replacements() -> list[Replacement]:
    """Lists the replacements for losses while several replicas train."""
    return [
        # Called through the module by Keras's losses, trainer and CompileLoss.
        (_loss, "scale_loss_for_distribution", lambda value: value),
        (_loss, "unscale_loss_for_distribution", lambda value: value),
        (_loss, "reduce_weighted_values", reduce_weighted_values),
        *_calls_of_losses(),
    ]


def _calls_of_losses() -> list[Replacement]:
    # CompileLoss, which calls a model's losses, is a subclass of Loss too.
    family = in_family(keras.losses.Loss, "call", _of_whole_batch)
    return [replacement for replacement in family if replacement[0] is not _CompileLoss]


def sees_whole_batch(function: Callable[..., Any], value: Any, *rows: Tensor) -> bool:
    """Returns whether a function compares rows of a batch.

    Such a function returns neither a value for each row nor a mean over the rows.

    Args:
        function: A function of targets and predictions.
        value: Its result for `rows`.
        rows: Its arguments, each of shape [rows, ...].
    """
    if not all(isinstance(part, tf.Tensor) and part.shape.rank for part in rows):
        return False
    # Where the test is not possible, a scalar is taken to compare rows, which is always right
    # but slower. A number for each row is taken to be one.
    is_scalar = tf.convert_to_tensor(value).shape.rank == 0
    is_known_mean = is_mean(function, *rows)
    return not is_known_mean if is_scalar else is_known_mean is False


def _of_whole_batch(original: Method) -> Method:
    """Gives the whole batch to a loss that compares its rows, such as Dice's."""

    @functools.wraps(original)
    def call(loss: Any, y_true: Any, y_pred: Any, **kwargs: Any) -> Any:
        batch = current_batch()
        function = functools.partial(original, loss, **kwargs)
        value = function(y_true, y_pred)
        if batch is None or not batch.is_shared:
            return value
        if not sees_whole_batch(function, value, y_true, y_pred):
            return value
        value = function(batch.gather(y_true), batch.gather(y_pred))
        batch.note_whole(value)
        return value

    return call


def gathered(weights: Any) -> Any:
    """Returns the weights or the mask of the whole batch. A scalar or None stays as it is.

    Args:
        weights: Weights or mask of the share's rows.
    """
    batch = current_batch()
    if batch is None or weights is None or not tf.convert_to_tensor(weights).shape.rank:
        return weights
    return batch.gather(tf.convert_to_tensor(weights))


def reduce_weighted_values(
    values: Tensor,
    sample_weight: Tensor = None,
    mask: Tensor = None,
    reduction: str | None = "sum_over_batch_size",
    dtype: Any = None,
) -> Tensor:
    """Reduces a loss so that its mean over replicas, weighted by their rows, is exact.

    Later the result is multiplied by the replica's fraction of the batch, and summed over
    replicas. That is right for a mean over rows. Other reductions are corrected here in
    advance: a sum, and a mean with the number of unmasked elements or the sum of weights as
    divisor.
    """
    batch = current_batch()
    is_whole = batch is not None and batch.is_whole(values)
    if is_whole and values.shape.rank:
        sample_weight, mask = gathered(sample_weight), gathered(mask)
    local = _keras_reduce_weighted_values(
        values, sample_weight=sample_weight, mask=mask, reduction=reduction, dtype=dtype
    )
    if batch is None or is_whole:
        return local
    if reduction in ("sum", "none", None):
        # The later product with the share gives the sum again.
        return local * batch.inverse_share_as(local.dtype)
    if reduction == "mean_with_sample_weight" and (sample_weight, mask) != (None, None):
        divisor = _keras_reduce_weighted_values(
            tf.ones_like(values), sample_weight, mask, reduction="sum", dtype=dtype
        )
    elif mask is not None:
        divisor = tf.reduce_sum(tf.cast(mask, local.dtype))
    else:
        return local
    # A share without rows has one row of padding, which must not count.
    wide = tf.float64 if local.dtype == tf.float64 else tf.float32
    divisor = tf.where(batch.has_rows, tf.cast(divisor, wide), tf.zeros([], wide))
    (total,) = batch.all_reduce([divisor])
    correction = tf.math.divide_no_nan(divisor, total) * batch.inverse_share_as(wide)
    return local * tf.cast(correction, local.dtype)
