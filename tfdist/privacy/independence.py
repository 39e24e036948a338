"""Checks that an example's gradient depends on no other example."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf

from tfdist.errors import ArgumentError
from tfdist.privacy import _layers, clipping

Tensor = Any
_HALF = ("bfloat16", "float16")


def check(model: Any, x: Any, y: Any, sample_weight: Any = None) -> None:
    """Compares the gradients of some examples, unclipped, with plain ones, and each alone.

    A weight that is used outside its layer's `call` (tied by hand, say) would else be missed,
    and a layer that mixes examples would not be noticed. The model is left as it was.

    Args:
        model: As in `clipped_sum`.
        x: As in `clipped_sum`; a few rows.
        y: As in `clipped_sum`.
        sample_weight: As in `clipped_sum`.

    Raises:
        ArgumentError: They differ, or the model changes its state or adds losses.
    """
    half = any(layer.compute_dtype in _HALF for layer in model._flatten_layers())
    tolerance = 0.05 if half else 1e-3
    state = model.non_trainable_variables
    before = [tf.identity(v.value) for v in state]
    try:
        with _exact_products():
            _check_sum(model, x, y, sample_weight, tolerance)
            _check_state(state, before)
            _check_each_alone(model, x, y, sample_weight, tolerance)
    finally:
        for variable, value in zip(state, before, strict=True):
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
    parts, plain, _ = clipping.recorded(model, x, y, sample_weight, also_plain=True)
    with _layers.without_regularizers(model.trainable_variables):
        if model.losses:
            raise ArgumentError(
                "The loss must come from `compile` and the regularizers of weights alone. "
                "Received: a model with a layer that calls `add_loss` or has an "
                "`activity_regularizer`: what they add is of the whole batch. Leave them out."
            )
    examples = tf.shape(parts[0].squared_norms())[0]
    ones = {id(part.variable): tf.ones([examples]) for part in parts}
    received = clipping.weighted_sums(model, parts, ones, tf.constant(True))
    for variable, sums, expected in zip(
        model.trainable_variables, received, plain, strict=True
    ):
        difference = float(tf.norm(sums - tf.cast(expected, tf.float32)))
        if difference > tolerance * float(tf.norm(tf.cast(expected, tf.float32))) + 1e-6:
            raise ArgumentError(
                "All weights must be used by the layers that hold them, in their `call`, and "
                "no layer may mix examples. Received: a model in which the gradients by "
                f"{variable.path!r} of single examples do not add up to the batch's. Let a "
                "layer be called where its weight is used."
            )


def _check_state(state: Sequence[Any], before: Sequence[Tensor]) -> None:
    for variable, value in zip(state, before, strict=True):
        if _layers.is_seed(variable) or bool(tf.reduce_all(variable.value == value)):
            continue
        raise ArgumentError(
            "A private model must keep no state of the examples that it sees: it would be "
            f"saved with the weights, without noise. Received: {variable.path!r}, which "
            "changes when the model is called. Use a layer without it."
        )


def _check_each_alone(model: Any, x: Any, y: Any, sample_weight: Any, tolerance: float) -> None:
    # Random numbers differ from call to call, so a model that draws them is compared without.
    training = not any(_layers.is_seed(v) for v in model.non_trainable_variables)

    def norms(*batch: Any) -> Tensor:
        parts, _, _ = clipping.recorded(model, *batch, training=training)
        return tf.sqrt(tf.maximum(tf.add_n([part.squared_norms() for part in parts]), 0.0))

    together = norms(x, y, sample_weight)
    for index in range(len(together)):
        rows = slice(index, index + 1)
        one = tf.nest.map_structure(
            lambda leaf, rows=rows: leaf if leaf is None else tf.convert_to_tensor(leaf)[rows],
            (x, y, sample_weight),
        )
        alone, with_others = float(norms(*one)[0]), float(together[index])
        if abs(alone - with_others) > tolerance * abs(alone) + 1e-6:
            raise ArgumentError(
                "No layer and no loss may mix the examples of a batch. Received: a model in "
                "which an example's gradient depends on the others: its norm is "
                f"{alone:.6g} alone and {with_others:.6g} among {len(together)}."
            )
