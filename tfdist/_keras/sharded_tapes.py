"""Gradients of weights in parts: `GradientTape` takes those of their whole values.

A weight may be read several times. Its gradient is the sum of those of all values that were
read. Some of them are this replica's part of the sum over all replicas already
(`regathering`), which their shape tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tfdist._keras.interception import Replacement
from tfdist._keras.replica import ReplicaBatch, current_batch
from tfdist._keras.sharded_weights import InParts
from tfdist.errors import StrategyError

_tensorflow_gradient = tf.GradientTape.gradient
_tensorflow_watch = tf.GradientTape.watch
_tensorflow_push = tf.GradientTape._push_tape


def replacements() -> list[Replacement]:
    """Lists the replacements in `GradientTape` while weights are in parts."""
    return [
        (tf.GradientTape, "_push_tape", _push),
        (tf.GradientTape, "watch", _watch),
        (tf.GradientTape, "gradient", _gradient),
    ]


def _push(tape: Any) -> None:
    batch = current_batch()
    if batch is not None:
        batch.gathered.clear()  # the new tape must see the weights being read
    _tensorflow_push(tape)


def _in_parts(source: Any) -> InParts | None:
    value = getattr(source, "_value", source)
    return value if isinstance(value, InParts) else None


def _watch(tape: Any, tensor: Any) -> None:
    flat = tf.nest.flatten(tensor)
    in_parts = [_in_parts(leaf) for leaf in flat]
    _tensorflow_watch(
        tape, [leaf if w is None else w.part for leaf, w in zip(flat, in_parts, strict=True)]
    )


def _gradient(
    tape: Any,
    target: Any,
    sources: Any,
    output_gradients: Any = None,
    unconnected_gradients: Any = tf.UnconnectedGradients.NONE,
) -> Any:
    """Returns gradients; that of a weight in parts is the sum of those of its whole values."""
    flat = tf.nest.flatten(sources)
    weights = [_in_parts(source) for source in flat]
    if not any(weights):
        return _tensorflow_gradient(
            tape, target, sources, output_gradients, unconnected_gradients
        )
    batch = _batch_of(weights)
    nested = [
        source
        if weight is None
        else [*batch.reads.get(id(weight), []), *batch.own_reads.get(id(weight), [])]
        for source, weight in zip(flat, weights, strict=True)
    ]
    found = _tensorflow_gradient(tape, target, nested, output_gradients, unconnected_gradients)
    is_zero = unconnected_gradients in (tf.UnconnectedGradients.ZERO, "zero")
    gradients = [
        gradient
        if weight is None
        else _own_total(gradient, weight, is_zero, len(batch.reads.get(id(weight), ())))
        if weight.is_divided
        else _total(gradient, weight, is_zero)
        for gradient, weight in zip(found, weights, strict=True)
    ]
    return tf.nest.pack_sequence_as(sources, gradients)


def _batch_of(weights: Sequence[InParts | None]) -> ReplicaBatch:
    batch = current_batch()
    if batch is None:
        name = next(weight.name for weight in weights if weight is not None)
        raise StrategyError(
            "The gradient of a weight in parts can be taken only in the steps of `fit`. "
            f"Received: a GradientTape that is asked for that of {name!r} elsewhere, such as "
            "in a callback. Do it after `fit`."
        )
    return batch


def _total(gradients: Sequence[Any], weight: InParts, is_zero: bool) -> Any:
    given = [gradient for gradient in gradients if gradient is not None]
    if not given:
        return tf.zeros(weight.shape, weight.dtype) if is_zero else None
    if len(given) == 1:
        return given[0]
    if any(is_part(gradient, weight) for gradient in given):
        return tf.add_n([_part_of(gradient, weight) for gradient in given])
    if not all(isinstance(gradient, tf.IndexedSlices) for gradient in given):
        return tf.add_n([tf.convert_to_tensor(gradient) for gradient in given])
    return _joined(given)


def _joined(given: Sequence[Any]) -> Any:
    """Adds sparse gradients, as in one process."""
    return tf.IndexedSlices(
        tf.concat([gradient.values for gradient in given], 0),
        tf.concat([tf.cast(gradient.indices, tf.int64) for gradient in given], 0),
        given[0].dense_shape,
    )


def _own_total(gradients: Sequence[Any], weight: InParts, is_zero: bool, wholes: int) -> Any:
    """Returns the gradient of a divided weight's own part. It is not summed over teams yet.

    Args:
        gradients: Those of whole values, then those of own parts.
        weight: The weight.
        is_zero: Whether a gradient of nothing is 0.
        wholes: Number of whole values.
    """
    shape = weight.cut.part_shape
    given = [
        gradient
        if index >= wholes
        else weight.gathering.own_gradient(weight.variable, gradient)
        for index, gradient in enumerate(gradients)
        if gradient is not None
    ]
    if not given:
        return tf.zeros(shape, weight.dtype) if is_zero else None
    if all(isinstance(gradient, tf.IndexedSlices) for gradient in given):
        return given[0] if len(given) == 1 else _joined(given)
    dense = [tf.ensure_shape(tf.convert_to_tensor(gradient), shape) for gradient in given]
    return dense[0] if len(dense) == 1 else tf.add_n(dense)


def is_part(gradient: Any, weight: InParts) -> bool:
    """Tells whether a gradient is this replica's part of the sum over all replicas."""
    return tuple(gradient.shape) == tuple(weight.cut.part_shape)


def _part_of(gradient: Any, weight: InParts) -> Any:
    if is_part(gradient, weight):
        return gradient
    (part,) = weight.gathering.scatter([weight.cut], [tf.convert_to_tensor(gradient)])
    return part
