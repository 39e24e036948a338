"""Per-example gradients of layers without a closed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf
from keras import layers

from tfdist.errors import ArgumentError
from tfdist.privacy import _layers
from tfdist.privacy.closed_forms import Call
from tfdist.privacy.parts import Part, Written

Tensor = Any


def computed_again(unit: Any, calls: Sequence[Call]) -> list[Part]:
    """Runs a layer without a closed form on one example after the other: exact, and slow.

    Args:
        unit: A `keras.Layer`.
        calls: Its calls.

    Raises:
        ArgumentError: It draws random numbers, and would draw others.
    """
    _check_repeatable(unit)
    variables = unit.trainable_variables
    values = [tf.convert_to_tensor(v) for v in variables]
    summed: list[Any] = [0.0] * len(variables)
    for call in calls:
        examples = tf.shape(tf.nest.flatten(call.outputs)[0])[0]

        def one(index: Tensor, call: Call = call) -> list[Tensor]:
            def row(leaf: Any) -> Any:
                is_batch = tf.is_tensor(leaf) and leaf.shape.rank != 0
                return leaf[index : index + 1] if is_batch else leaf

            args, kwargs, gradients = tf.nest.map_structure(
                row, (call.args, call.kwargs, call.gradients)
            )
            in_use = list(zip(variables, values, strict=True))
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(values)
                # Wherever the variables live, the layer uses these values.
                with keras.StatelessScope(state_mapping=in_use):
                    outputs = unit(*args, **kwargs)
            found = tape.gradient(
                outputs,
                values,
                output_gradients=gradients,
                unconnected_gradients=tf.UnconnectedGradients.ZERO,
            )
            return [tf.cast(tf.convert_to_tensor(g), tf.float32) for g in found]

        each = tf.map_fn(
            one,
            tf.range(examples),
            fn_output_signature=[tf.TensorSpec(v.shape, tf.float32) for v in variables],
        )
        summed = [before + more for before, more in zip(summed, each, strict=True)]
    return [Written(v, each) for v, each in zip(variables, summed, strict=True)]


def _check_repeatable(unit: Any) -> None:
    """Refuses what would give another result the second time."""
    inside = [unit, *unit._flatten_layers(include_self=False)]
    if isinstance(unit, layers.RNN):
        inside.append(unit.cell)
    random = any(
        getattr(part, name, 0)
        for part in inside
        for name in ("dropout", "recurrent_dropout", "rate", "stddev")
    )
    known = isinstance(unit, layers.RNN | layers.TimeDistributed)
    if _layers.seeds(unit) and (random or not known):
        raise ArgumentError(
            "A layer without a closed form must give the same outputs when it is called "
            f"again. Received: the layer {unit.name!r} of type {type(unit).__name__}, with "
            "random numbers of its own. Use a layer of its own for dropout."
        )
