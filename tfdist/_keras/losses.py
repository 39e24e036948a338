"""Losses of a share, so that their sums over replicas are those of the batch."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
from keras.src.losses import loss as _loss

from tfdist._keras.replica import Tensor, current_batch

_keras_reduce_weighted_values = _loss.reduce_weighted_values


def reduce_weighted_values(
    values: Tensor,
    sample_weight: Tensor = None,
    mask: Tensor = None,
    reduction: str | None = "sum_over_batch_size",
    dtype: Any = None,
) -> Tensor:
    """Reduces a loss so that its mean over replicas, weighted by their rows, is exact.

    Later the result is multiplied by the replica's share and summed over replicas. For a
    mean over rows that is all; a sum, or a mean whose divisor is a number of unmasked
    elements or a sum of weights, is corrected here for what that will do to it.
    """
    local = _keras_reduce_weighted_values(
        values, sample_weight=sample_weight, mask=mask, reduction=reduction, dtype=dtype
    )
    batch = current_batch()
    if batch is None:
        return local
    if reduction in ("sum", "none", None):
        return local * tf.cast(batch.inverse_share, local.dtype)
    if reduction == "mean_with_sample_weight" and (sample_weight, mask) != (None, None):
        divisor = _keras_reduce_weighted_values(
            tf.ones_like(values), sample_weight, mask, reduction="sum", dtype=dtype
        )
    elif mask is not None:
        divisor = tf.reduce_sum(tf.cast(mask, local.dtype))
    else:
        return local
    divisor = tf.where(batch.has_rows, tf.cast(divisor, tf.float32), 0.0)
    (total,) = batch.all_reduce([divisor])
    correction = tf.math.divide_no_nan(divisor, total) * batch.inverse_share
    return local * tf.cast(correction, local.dtype)
