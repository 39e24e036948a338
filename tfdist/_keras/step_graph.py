"""The graph of a training step, traced from shapes and never run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf
from keras.src import backend as _backend
from tensorflow.python.framework import func_graph as _func_graph

from tfdist._keras.discovery import keeping_random_state
from tfdist._keras.variables import backing_variable


@dataclass(frozen=True)
class StepGraph:
    """The graph of a step, in the order in which its ops were made.

    Attributes:
        ops: All ops.
        forward: Number of ops of the forward pass, which come first.
        gradients: The gradients of the weights.
        inputs: The tensors of the batch.
        weights: The ids of the `keras.Variable`s of the gradients.
        reads: The ids of the `keras.Variable`s by the names of the tensors that read them.
    """

    ops: tuple[Any, ...]
    forward: int
    gradients: tuple[Any, ...]
    inputs: tuple[Any, ...]
    weights: tuple[int, ...]
    reads: Mapping[str, int]


def step_graph(model: Any, x: Any, y: Any) -> StepGraph:
    """Traces the forward and the backward pass of a step.

    Relies on `Trainer._compute_loss`.

    Args:
        model: A built `keras.Model`. If it is not compiled, the sum of its outputs is its loss.
        x: Inputs, nested `tf.TensorSpec`s with the size of the batch.
        y: Targets, like `x`, or None to use the sum of the outputs as loss.
    """
    traced: list[Any] = []

    def step(x: Any, y: Any) -> None:
        graph = tf.compat.v1.get_default_graph()
        with tf.GradientTape() as tape:
            outputs = model(x, training=True)
            if y is None:
                leaves = tf.nest.flatten(outputs)
                loss = tf.add_n([tf.reduce_sum(tf.cast(o, tf.float32)) for o in leaves])
            else:
                loss = model._compute_loss(x=x, y=y, y_pred=outputs, training=True)
            # Ops are listed in the order of the trace, so those of the forward pass come first.
            forward = len(graph.get_operations())
        weights = model.trainable_weights
        gradients = zip(tape.gradient(loss, weights), weights, strict=True)
        pairs = [(gradient, id(v)) for gradient, v in gradients if gradient is not None]
        traced.extend([forward, pairs, tf.nest.flatten((x, y))])

    with keeping_random_state():
        graph = _func_graph.func_graph_from_py_func("memory", step, (x, y), {})
    forward, pairs, inputs = traced
    ops = tuple(graph.get_operations())
    return StepGraph(
        ops,
        forward,
        tuple(gradient for gradient, _ in pairs),
        tuple(t for t in inputs if t is not None),
        tuple(weight for _, weight in pairs),
        dict(_reads(model, graph, ops)),
    )


def _reads(model: Any, graph: Any, ops: Sequence[Any]) -> Iterator[tuple[str, int]]:
    """Finds which op reads which weight: by the placeholders of the variables' handles."""
    handles = {id(handle): inner.name for handle, inner in graph.captures}
    weights = {}
    for variable in model.weights:
        backing = backing_variable(variable)  # whose `whole` is read if it is in parts
        handle = getattr(getattr(backing, "whole", backing), "handle", None)
        if id(handle) in handles:
            weights[handles[id(handle)]] = id(variable)
    for op in ops:
        if op.type == "ReadVariableOp" and op.inputs[0].name in weights:
            yield op.outputs[0].name, weights[op.inputs[0].name]


def batch_specs(model: Any, rows: int, x: Any, y: Any) -> tuple[Any, Any] | None:
    """Describes a batch.

    Relies on `Functional._inputs_struct`, and on `CompileLoss`, whose `_user_loss` is what
    `compile` was given.

    Args:
        model: A built `keras.Model`.
        rows: Number of rows.
        x: Some examples, or None.
        y: Some targets, or None.

    Returns:
        `tf.TensorSpec`s like `x` and like `y`. The latter are None if the model has no loss.
        None if the model does not know its inputs.
    """
    inputs = _like(x, rows) if x is not None else _inputs(model, rows)
    if inputs is None:
        return None
    loss = getattr(model, "loss", None)
    if y is not None or loss is None:
        return inputs, None if y is None else _like(y, rows)
    outputs = _backend.compute_output_spec(
        model,
        tf.nest.map_structure(
            lambda spec: keras.KerasTensor(spec.shape, _backend.standardize_dtype(spec.dtype)),
            inputs,
        ),
        training=True,
    )
    losses = {str(getattr(leaf, "name", leaf)).lower() for leaf in tf.nest.flatten(loss)}
    # Keras's losses that take class numbers have "sparse" in their names. For other losses with
    # such targets, the user passes `y`.
    is_sparse = any("sparse" in name for name in losses)

    def target(output: Any) -> Any:
        shape = (rows, *output.shape[1:])
        dtype = tf.as_dtype(output.dtype)
        return tf.TensorSpec(shape[:-1], tf.int32) if is_sparse else tf.TensorSpec(shape, dtype)

    return inputs, tf.nest.map_structure(target, outputs)


def _like(examples: Any, rows: int) -> Any:
    def spec(leaf: Any) -> Any:
        tensor = leaf if isinstance(leaf, tf.TensorSpec) else tf.convert_to_tensor(leaf)
        return tf.TensorSpec((rows, *tensor.shape[1:]), tensor.dtype)

    return tf.nest.map_structure(spec, examples)


def _inputs(model: Any, rows: int) -> Any:
    inner = getattr(model, "_functional", None) or model
    inputs = getattr(inner, "_inputs_struct", None)
    if inputs is None or any(None in leaf.shape[1:] for leaf in tf.nest.flatten(inputs)):
        return None
    return tf.nest.map_structure(
        lambda leaf: tf.TensorSpec((rows, *leaf.shape[1:]), tf.as_dtype(leaf.dtype)), inputs
    )
