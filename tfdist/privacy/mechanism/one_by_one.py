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
from tfdist.privacy.mechanism.closed_forms import RecordedCall
from tfdist.privacy.mechanism.parts import GradientPart, Written

Tensor = Any


def computed_again(
    unit: Any, calls: Sequence[RecordedCall], variables: Sequence[Any], folded: int = 1
) -> list[GradientPart]:
    """Runs a layer without a closed form on one example after the other. Exact, but slow.

    Args:
        unit: A `keras.Layer`.
        calls: Its calls.
        variables: The variables by which gradients are computed.
        folded: The number of neighbouring rows of an example in these calls.

    Raises:
        ArgumentError: The layer draws random numbers that do not follow from keys of rows.
    """
    _check_repeatable(unit)
    values = [tf.convert_to_tensor(v) for v in variables]
    # A layer may be called several times in a pass. Its gradient is the sum over the calls.
    totals: list[Any] = [0.0] * len(variables)
    for call in calls:
        examples = tf.shape(tf.nest.flatten(call.outputs)[0])[0] // folded

        def gradients_at(index: Tensor, call: RecordedCall = call) -> list[Tensor]:
            def row(leaf: Any) -> Any:
                if not tf.is_tensor(leaf) or leaf.shape.rank == 0:
                    return leaf
                if folded == 1:  # XLA needs the static size that `gather` gives
                    return tf.gather(leaf, index)[None]
                return leaf[index * folded : (index + 1) * folded]

            args, kwargs, gradients = tf.nest.map_structure(
                row, (call.args, call.kwargs, call.gradients)
            )
            # The tape watches the values, and variables may be on a server. So the layer must
            # use the values instead of its variables.
            in_use = [*zip(variables, values, strict=True), *call.seeds]
            with (
                _keras.on_replica(one_row(index)),
                tf.GradientTape(watch_accessed_variables=False) as tape,
                keras.StatelessScope(state_mapping=in_use),
            ):
                tape.watch(values)
                outputs = unit(*args, **kwargs)
            by_values = tape.gradient(
                outputs,
                values,
                output_gradients=gradients,
                unconnected_gradients=tf.UnconnectedGradients.ZERO,
            )
            return [tf.cast(tf.convert_to_tensor(g), tf.float32) for g in by_values]

        of_call = _keras.map_fn(
            gradients_at,
            tf.range(examples),
            fn_output_signature=[tf.TensorSpec(v.shape, tf.float32) for v in variables],
        )
        totals = [total + term for total, term in zip(totals, of_call, strict=True)]
    return [Written(v, gradients) for v, gradients in zip(variables, totals, strict=True)]


def one_row(index: Tensor) -> ReplicaBatch | None:
    """Describes one row of the replica's batch, or returns None outside of a replica's step.

    Args:
        index: The row's place in the replica's batch.
    """
    batch = current_batch()
    if batch is None:
        return None
    count, place = tf.ones([], tf.int64), batch.offset + tf.cast(index, tf.int64)
    keys = getattr(batch, "keys", None)  # of the rows' random numbers
    key = {} if keys is None else {"keys": keys.at(index[None])}
    return ReplicaBatch(count, batch.total, place, batch.all_reduce, batch.all_gather, **key)


def _check_repeatable(unit: Any) -> None:
    """Refuses a layer whose second run would draw other random numbers than the first."""
    inner_layers = _keras.layers_of(unit)
    inner_layers += [layer.cell for layer in inner_layers if hasattr(layer, "cell")]
    is_random = any(
        getattr(layer, name, 0)
        for layer in inner_layers
        for name in ("dropout", "recurrent_dropout", "rate", "stddev")
    )
    keys = getattr(current_batch(), "keys", None)
    if is_random and keys is None and keras_layers.seeds(unit):
        raise ArgumentError(
            "A layer without a closed form must give the same outputs when it is called again. "
            f"Received: the layer {unit.name!r} of type {type(unit).__name__}, whose random "
            "numbers do not follow from keys of rows. Use it in `fit`, which sets these keys."
        )
