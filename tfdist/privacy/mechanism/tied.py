"""Weights that are used outside the recorded calls: tied by hand, or in a loss of one's own.

Of such a use nothing is recorded. So all uses of that weight are computed again, by running the
whole model on one example after the other: exact, and slow.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfdist import _keras
from tfdist._keras import layers as keras_layers
from tfdist.privacy.mechanism.one_by_one import one_row
from tfdist.privacy.mechanism.parts import GradientPart, Written

Tensor = Any


def tied(model: Any, units: Sequence[Any], loss: Callable[[Any], Tensor], x: Any) -> list[Any]:
    """Finds weights that the loss depends on other than through calls of recorded layers.

    The model is traced once, with the weights cut off in its calls of these layers, and never
    run. What is found is kept.

    Args:
        model: A compiled, built `keras.Model`.
        units: The layers whose calls are recorded.
        loss: Gives the loss of the model's outputs.
        x: A batch of inputs.

    Returns:
        Some of the model's trainable variables.
    """
    variables = model.trainable_variables
    key = tuple(id(v) for v in variables)
    known, found = _keras.attached(model).tied_weights
    if known != key:
        found = _connected(model, units, loss, x)
        _keras.attached(model).tied_weights = key, found
    return [v for v in variables if id(v) in found]


def found_tied(model: Any) -> list[str]:
    """Names the weights that `tied` has found.

    Args:
        model: A `keras.Model`.
    """
    _, found = _keras.attached(model).tied_weights
    return [v.path for v in model.trainable_variables if id(v) in found]


def _connected(
    model: Any, units: Sequence[Any], loss: Callable[[Any], Tensor], x: Any
) -> frozenset[int]:
    variables = model.trainable_variables
    found: set[int] = set()

    def without(unit: Any) -> Callable[..., Any]:
        def call_without(call: Any, *args: Any, **kwargs: Any) -> Any:
            cut = [
                (v, tf.stop_gradient(tf.convert_to_tensor(v))) for v in unit.trainable_variables
            ]
            with keras.StatelessScope(state_mapping=cut):
                return call(*args, **kwargs)

        return call_without

    def trace() -> None:
        values = [v.value for v in variables]
        with contextlib.ExitStack() as stack:
            stack.enter_context(_keras.on_replica(None))  # whose graph is another one
            tape = stack.enter_context(tf.GradientTape(watch_accessed_variables=False))
            for value in values:
                tape.watch(value)
            with contextlib.ExitStack() as cut:
                for unit in units:
                    cut.enter_context(keras_layers.called_through(unit, without(unit)))
                outputs = model(x, training=True)
            whole = loss(outputs)
        gradients = tape.gradient(whole, values)
        found.update(id(v) for v, g in zip(variables, gradients, strict=True) if g is not None)

    if model.run_eagerly:  # its code may be no graph's; what it assigns is left out
        with keras.StatelessScope():
            trace()
    else:
        tf.function(trace, autograph=False).get_concrete_function()
    return frozenset(found)


def of_tied(
    model: Any,
    variables: Sequence[Any],
    batch: tuple[Any, Any, Any],
    training: bool,
    seeds: Sequence[tuple[Any, Tensor]],
) -> list[GradientPart]:
    """Computes the gradients of each example's loss by some weights, one after the other.

    Args:
        model: A compiled, built `keras.Model`.
        variables: The weights.
        batch: `x`, `y` and `sample_weight`, nested as Keras has them.
        training: As the model takes it.
        seeds: States of the model's random numbers, and what they were when it was run on the
            batch: in `fit` a row then has the random numbers that it had there.
    """
    x, _, _ = batch
    values = [tf.convert_to_tensor(v) for v in variables]
    in_use = [*zip(variables, values, strict=True), *seeds]

    def alone(index: Tensor) -> list[Tensor]:
        one_x, one_y, one_weight = tf.nest.map_structure(
            lambda leaf: (
                leaf if leaf is None else tf.convert_to_tensor(leaf)[index : index + 1]
            ),
            batch,
        )
        with (
            keras_layers.without_regularizers(model.trainable_variables),
            tf.GradientTape(watch_accessed_variables=False) as tape,
            keras.StatelessScope(state_mapping=in_use),
        ):
            tape.watch(values)
            with _keras.on_replica(one_row(index)):
                outputs = model(one_x, training=training)
            with _keras.on_replica(None):  # the loss is no part of a larger batch's
                loss = keras_layers.compiled_loss(model, one_x, one_y, outputs, one_weight)
        found = tape.gradient(loss, values, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        return [tf.cast(tf.convert_to_tensor(g), tf.float32) for g in found]

    each = _keras.map_fn(
        alone,
        tf.range(tf.shape(tf.nest.flatten(x)[0])[0]),
        fn_output_signature=[tf.TensorSpec(v.shape, tf.float32) for v in variables],
    )
    return [Written(v, gradients) for v, gradients in zip(variables, each, strict=True)]
