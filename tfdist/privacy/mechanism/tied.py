"""Gradients by weights that are used outside the recorded calls of layers.

Examples are weights that are tied by hand, and weights in a custom loss. Such uses are not
recorded. So all uses of these weights are computed again, by running the whole model on one
example after the other. This is exact but slow.
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
    """Finds weights on which the loss depends other than through recorded calls.

    The model is traced once and never run. In the trace, the calls of recorded layers pass no
    gradient to their weights, so a gradient that remains comes from another use. The result is
    cached with the model.

    Args:
        model: A compiled, built `keras.Model`.
        units: The layers whose calls are recorded.
        loss: A function from the model's outputs to the loss.
        x: A batch of inputs.

    Returns:
        Some of the model's trainable variables.
    """
    variables = model.trainable_variables
    key = tuple(id(v) for v in variables)
    cached_key, tied_ids = _keras.attached(model).tied_weights
    if cached_key != key:
        tied_ids = _connected(model, units, loss, x)
        _keras.attached(model).tied_weights = key, tied_ids
    return [v for v in variables if id(v) in tied_ids]


def found_tied(model: Any) -> list[str]:
    """Lists the paths of the weights that `tied` has found.

    Args:
        model: A `keras.Model`.
    """
    _, tied_ids = _keras.attached(model).tied_weights
    return [v.path for v in model.trainable_variables if id(v) in tied_ids]


def _connected(
    model: Any, units: Sequence[Any], loss: Callable[[Any], Tensor], x: Any
) -> frozenset[int]:
    """Returns the ids of the weights by which the loss has other gradients."""
    variables = model.trainable_variables
    connected: set[int] = set()

    def without(unit: Any) -> Callable[..., Any]:
        def call_without(call: Any, *args: Any, **kwargs: Any) -> Any:
            constants = [
                (v, tf.stop_gradient(tf.convert_to_tensor(v))) for v in unit.trainable_variables
            ]
            with keras.StatelessScope(state_mapping=constants):
                return call(*args, **kwargs)

        return call_without

    def trace() -> None:
        values = [v.value for v in variables]
        with contextlib.ExitStack() as stack:
            stack.enter_context(_keras.on_replica(None))  # its tensors belong to another graph
            tape = stack.enter_context(tf.GradientTape(watch_accessed_variables=False))
            for value in values:
                tape.watch(value)
            with contextlib.ExitStack() as layer_stack:
                for unit in units:
                    layer_stack.enter_context(keras_layers.called_through(unit, without(unit)))
                outputs = model(x, training=True)
            loss_value = loss(outputs)
        gradients = tape.gradient(loss_value, values)
        # None means that no path leads from the weight to the loss. A zero would still be a
        # path.
        pairs = zip(variables, gradients, strict=True)
        connected.update(id(v) for v, g in pairs if g is not None)

    tf.function(trace, autograph=False).get_concrete_function()
    return frozenset(connected)


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
        training: The argument `training` of the model.
        seeds: Pairs of a state of the model's random numbers and its value when the model ran
            on the batch. In `fit`, a row then has the same random numbers as in the batch.
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
            with _keras.on_replica(None):  # the loss must not be scaled to the global batch
                loss = keras_layers.compiled_loss(model, one_x, one_y, outputs, one_weight)
        gradients = tape.gradient(
            loss, values, unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
        return [tf.cast(tf.convert_to_tensor(g), tf.float32) for g in gradients]

    by_variable = _keras.map_fn(
        alone,
        tf.range(tf.shape(tf.nest.flatten(x)[0])[0]),
        fn_output_signature=[tf.TensorSpec(v.shape, tf.float32) for v in variables],
    )
    return [Written(v, gradients) for v, gradients in zip(variables, by_variable, strict=True)]
