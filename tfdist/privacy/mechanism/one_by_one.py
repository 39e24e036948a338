"""Per-example gradients of layers without a closed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from tfdist import _keras
from tfdist._keras import ReplicaBatch
from tfdist._keras import layers as keras_layers
from tfdist._keras.replica import current_batch
from tfdist.errors import ArgumentError
from tfdist.privacy.mechanism.closed_forms import LayerCall
from tfdist.privacy.mechanism.parts import GradientPart, Written

Tensor = Any


def computed_again(
    unit: Any, calls: Sequence[LayerCall], variables: Sequence[Any], folded: int = 1
) -> list[GradientPart]:
    """Runs a layer without a closed form on one example after the other: exact, and slow.

    Args:
        unit: A `keras.Layer`.
        calls: Its calls.
        variables: By which gradients are computed.
        folded: Rows of an example in these calls, one behind the other.

    Raises:
        ArgumentError: It draws random numbers, which do not follow from keys of rows here.
    """
    _check_repeatable(unit)
    values = [tf.convert_to_tensor(v) for v in variables]
    summed: list[Any] = [0.0] * len(variables)
    for call in calls:
        examples = tf.shape(tf.nest.flatten(call.outputs)[0])[0] // folded

        def one(index: Tensor, call: LayerCall = call) -> list[Tensor]:
            def row(leaf: Any) -> Any:
                if not tf.is_tensor(leaf) or leaf.shape.rank == 0:
                    return leaf
                if folded == 1:  # of known size, as XLA wants it
                    return tf.gather(leaf, index)[None]
                return leaf[index * folded : (index + 1) * folded]

            args, kwargs, gradients = tf.nest.map_structure(
                row, (call.args, call.kwargs, call.gradients)
            )
            # Wherever the variables live, the layer uses these values.
            in_use = [*zip(variables, values, strict=True), *call.seeds]
            with (
                _keras.on_replica(one_row(index)),
                tf.GradientTape(watch_accessed_variables=False) as tape,
                keras.StatelessScope(state_mapping=in_use),
            ):
                tape.watch(values)
                outputs = unit(*args, **kwargs)
            found = tape.gradient(
                outputs,
                values,
                output_gradients=gradients,
                unconnected_gradients=tf.UnconnectedGradients.ZERO,
            )
            return [tf.cast(tf.convert_to_tensor(g), tf.float32) for g in found]

        each = _keras.map_fn(
            one,
            tf.range(examples),
            fn_output_signature=[tf.TensorSpec(v.shape, tf.float32) for v in variables],
        )
        summed = [before + more for before, more in zip(summed, each, strict=True)]
    return [Written(v, each) for v, each in zip(variables, summed, strict=True)]


def one_row(index: Tensor) -> ReplicaBatch | None:
    """Gives one row of the share that the replica computes, where it computes one.

    Args:
        index: Its place in the share.
    """
    share = current_batch()
    if share is None:
        return None
    one, place = tf.ones([], tf.int64), share.offset + tf.cast(index, tf.int64)
    keys = getattr(share, "keys", None)  # what rows' random numbers follow from, if given
    own = {} if keys is None else {"keys": keys.at(index[None])}
    return ReplicaBatch(one, share.total, place, share.all_reduce, share.all_gather, **own)


def _check_repeatable(unit: Any) -> None:
    """Refuses what would give another result the second time."""
    inside = _keras.layers_of(unit)
    inside += [layer.cell for layer in inside if hasattr(layer, "cell")]
    random = any(
        getattr(part, name, 0)
        for part in inside
        for name in ("dropout", "recurrent_dropout", "rate", "stddev")
    )
    keys = getattr(current_batch(), "keys", None)
    if random and keys is None and keras_layers.seeds(unit):
        raise ArgumentError(
            "A layer without a closed form must give the same outputs when it is called "
            f"again. Received: the layer {unit.name!r} of type {type(unit).__name__}, with "
            "random numbers that do not follow from keys of rows, as they do in `fit`."
        )
