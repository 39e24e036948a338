"""Checks that an example's gradient depends on no other example.

Clipping bounds an example's contribution only if the contributions of other examples do not
depend on it. So half of some rows are computed in several batches: alone, and together with
the other half, which is changed, enlarged and moved. The random numbers of each row stay the
same. The half must add the same to the gradient in each batch, and the derivatives of its
outputs by the inputs of other rows must be 0. A layer may also begin to mix examples later, or
only in larger batches: see `spot_checks`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfdist import _keras
from tfdist._keras import layers as keras_layers
from tfdist.errors import ArgumentError
from tfdist.privacy.mechanism import clipping, rows
from tfdist.privacy.mechanism.comparison import Comparison, public_keys
from tfdist.privacy.mechanism.contributions import (
    drawing,
    tolerance_for,
)
from tfdist.privacy.mechanism.parts import weighted_sums
from tfdist.privacy.mechanism.unfit_layers import keeps_state

Tensor = Any
_ROWS_FOR_SUMS = 3  # rows that are computed eagerly, which is slow
_SUM = 1e-3  # relative difference of a sum of gradients from the plain gradient
_ROUNDING = 1e-6  # by which gradients that cancel may differ, relative to their norms


def check(
    model: Any, x: Any, y: Any, sample_weight: Any = None, l2_norm_clip: float = 1.0
) -> None:
    """Checks the gradients of some examples against plain ones, and in several batches.

    The sum of the unclipped gradients of examples must be the plain gradient. It is not if a
    weight is used in a way that is not recorded. The model's state is restored.

    Args:
        model: As in `clipped_sum`.
        x: Some rows, which should differ. As in `clipped_sum`.
        y: As in `clipped_sum`.
        sample_weight: As in `clipped_sum`.
        l2_norm_clip: The clipping norm, of the first step if it changes.

    Raises:
        ArgumentError: They differ, or the model changes its state, adds losses, or draws
            random numbers by other means than `keras.random`.
    """
    state = model.non_trainable_variables
    values = [tf.identity(v.value) for v in state]
    few_rows = rows.selected((x, y, sample_weight), np.arange(_ROWS_FOR_SUMS) % rows.count(x))
    try:
        with _exact_products(), _keras.replicated(), keras_layers.in_float32(model):
            tolerance = tolerance_for(model)
            _check_sum(model, *few_rows, tolerance)
            _check_state(state, values)
            Comparison(model, (x, y, sample_weight), tolerance, l2_norm_clip).make()
    finally:
        for variable, value in zip(state, values, strict=True):
            variable.assign(value)


@contextlib.contextmanager
def _exact_products() -> Iterator[None]:
    """Keeps GPUs from rounding the factors of products to 11 bits (TensorFloat-32)."""
    rounds = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    try:
        yield
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(rounds)


def _check_sum(model: Any, x: Any, y: Any, sample_weight: Any, tolerance: float) -> None:
    """Checks that the gradients of single examples add up to the batch's gradient."""
    with drawing(public_keys(tf.range(1, rows.count(x) + 1, dtype=tf.int64))):
        parts, plain, _ = clipping.recorded(model, x, y, sample_weight, also_plain=True)
    with keras_layers.without_regularizers(model.trainable_variables):
        if model.losses:
            raise ArgumentError(
                "The loss must come from `compile` and from regularizers of weights alone. "
                "Received: a model with a layer that calls `add_loss` or has an "
                "`activity_regularizer`, whose loss is of the whole batch. Leave them out."
            )
    squares = tf.add_n([part.squared_norms() for part in parts])
    scale = float(tf.sqrt(tf.reduce_sum(squares)))
    ones = {id(part.variable): tf.ones(tf.shape(squares)) for part in parts}
    (received,) = weighted_sums(model, parts, [ones], tf.constant(True))
    for variable, sums, expected in zip(
        model.trainable_variables, received, plain, strict=True
    ):
        difference = float(tf.norm(sums - tf.cast(expected, tf.float32)))
        norm = float(tf.norm(tf.cast(expected, tf.float32)))
        if difference > _SUM * norm + _ROUNDING * scale:
            raise ArgumentError(
                "Each weight must be used only by the layer that holds it, in its `call`, and "
                "no layer may mix examples. Received: a model in which the gradients by "
                f"{variable.path!r} of single examples do not add up to the batch's. Call the "
                "layer where its weight is used."
            )


def _check_state(state: Sequence[Any], values: Sequence[Tensor]) -> None:
    for variable, value in zip(state, values, strict=True):
        if keras_layers.is_seed(variable) or bool(tf.reduce_all(variable.value == value)):
            continue
        raise keeps_state(variable.path)
