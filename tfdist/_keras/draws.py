"""Applies preprocessing layers so that replicas draw the random numbers of one process.

The numbers of an example are a function of its position in the global batch. In private
training they are a function of its contents.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf
from keras.src import backend as _backend

from tfdist._keras import dataset_maps
from tfdist._keras.inlined import InlinedGraphs
from tfdist._keras.layer_draws import (
    PROBE,
    CountingDraws,
    ExampleDraws,
    RowDraws,
    TransformedRows,
    drawing,
    fold,
)
from tfdist._keras.traces import map_fn
from tfdist.errors import ArgumentError

__all__ = ["TransformedRows", "draws_by_row", "mixes", "transform", "transformed"]

Tensor = Any
# Ops whose numbers depend on earlier draws, which differ between replicas.
_STATEFUL = ("Random", "Rng", "Multinomial", "TruncatedNormal", "ParameterizedTruncated")


def transformed(layer: Any, spec: Any) -> Any:
    """Builds a layer, and computes the shape and dtype of its output.

    Args:
        layer: A `keras.Layer`.
        spec: The `tf.TensorSpec` of a batch.

    Returns:
        The `tf.TensorSpec` of the output.
    """
    symbol = keras.KerasTensor(spec.shape, _backend.standardize_dtype(spec.dtype))
    output = _backend.compute_output_spec(layer, symbol, training=True)
    return tf.TensorSpec((None, *output.shape[1:]), tf.as_dtype(output.dtype))


def draws_by_row(layer: Any, spec: Any) -> bool:
    """Returns whether all draws of a layer have a separate number for each example.

    Args:
        layer: A built `keras.Layer`.
        spec: The `tf.TensorSpec` of a batch.

    Returns:
        False for a layer that draws once for a whole batch, such as `RandomCrop`.

    Raises:
        ArgumentError: The layer mixes examples, draws numbers without a seed, or keeps state.
    """
    draws = CountingDraws()

    def probe(batch: Tensor) -> Tensor:
        with drawing(draws):
            return layer(batch, training=True)

    # Traced, never run. No layer has the size PROBE by itself, so a draw with a first axis of
    # this size has a number for each example.
    traced = tf.function(probe, autograph=False).get_concrete_function(
        tf.TensorSpec((PROBE, *spec.shape[1:]), spec.dtype)
    )
    definition = traced.graph.as_graph_def()
    name = type(layer).__name__
    if draws.mixes:
        raise mixes(name)
    functions = definition.library.function
    nodes = [*definition.node, *(node for f in functions for node in f.node_def)]
    stateful_ops = sorted({node.op for node in nodes if node.op.startswith(_STATEFUL)})
    if stateful_ops:
        raise ArgumentError(
            "A layer of `Augment` must draw by keras.random, from a SeedGenerator. "
            f"Received: {name}, which draws by TensorFlow's {stateful_ops[0]}."
        )
    # A graph lists its captured tensors after its arguments.
    arguments = traced.graph.inputs[: len(traced.graph.inputs) - len(traced.graph.captures)]
    shapes = [tensor.shape for tensor in arguments]
    state = dataset_maps.state_of(traced, shapes, InlinedGraphs())
    if state is not None:
        raise ArgumentError(
            "A layer of `Augment` must keep no state: an example would change those after it, "
            f"and replicas would differ. Received: {name}, with the operation {state}. Leave "
            "the state out, or put the layer into the model."
        )
    return draws.by_row == draws.count


def mixes(name: str) -> ArgumentError:
    """Makes the error for a layer that mixes examples.

    Args:
        name: The name of the layer's class.
    """
    return ArgumentError(
        "A layer of `Augment` must treat each example by itself. Received: "
        f"{name}, which mixes the examples of a batch. Put it into the model."
    )


def transform(layer: Any, batch: Tensor, rows: TransformedRows, by_row: bool) -> Tensor:
    """Applies a layer. Its random numbers are a function of `rows`.

    Args:
        layer: A built `keras.Layer`.
        batch: Tensor of shape [chosen, ...].
        rows: The examples of `batch`.
        by_row: The result of `draws_by_row`. If False, the layer is applied to each example
            separately.
    """
    if by_row:
        with drawing(RowDraws(rows)):
            return layer(batch, training=True)

    # A layer that draws once for a whole batch would change all examples alike, and otherwise
    # on each replica. Here each example is a batch of its own.
    def transform_one(example_and_identity: tuple[Tensor, Tensor]) -> Tensor:
        example, identity = example_and_identity
        with drawing(ExampleDraws(fold(rows.seed, identity))):
            return layer(example[None], training=True)[0]

    output = transformed(layer, tf.TensorSpec((None, *batch.shape[1:]), batch.dtype))
    signature = tf.TensorSpec(output.shape[1:], output.dtype)
    return map_fn(transform_one, (batch, rows.identity), fn_output_signature=signature)
