"""The graph of a Sequential or functional model: its calls of layers, in their order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf
from keras.src.models.functional import Functional as _Functional

_FREE = ("Const", "Placeholder", "Identity", "ReadVariableOp", "Reshape", "Shape")
_PRODUCTS = ("Conv2D", "Conv3D", "DepthwiseConv2dNative")
_MATRIX_PRODUCTS = ("MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3")


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer, or of an operation of `keras.ops`, in a model's graph.

    Attributes:
        node: Keras's node.
        reads: The ids of the `KerasTensor`s that it reads.
        makes: The ids of those that it makes.
    """

    node: Any
    reads: tuple[int, ...]
    makes: tuple[int, ...]

    @property
    def name(self) -> str:
        """The layer's name."""
        return str(self.node.operation.name)

    @property
    def variables(self) -> list[Any]:
        """The layer's variables, with those of its parts."""
        return list(getattr(self.node.operation, "variables", ()))

    @property
    def flops(self) -> int:
        """Float operations for one example in the forward pass, as far as they are known."""
        least = 2 * sum(math.prod(map(int, v.shape)) for v in self.variables)
        return max(_flops(self.node), least)


def functional_of(model: Any) -> Any:
    """Returns the functional model by which a model computes, None if it has code of its own.

    Args:
        model: A built `keras.Model`.
    """
    if isinstance(model, keras.Sequential):
        own = type(model).call is not keras.Sequential.call
        return None if own else model._functional
    is_plain = isinstance(model, _Functional) and type(model).call is _Functional.call
    return model if is_plain else None


def layer_calls(functional: Any) -> list[LayerCall]:
    """Lists the calls of a functional model's graph, in the order in which Keras makes them.

    Relies on `Function._nodes_by_depth`.

    Args:
        functional: The result of `functional_of`.
    """
    depths = sorted(functional._nodes_by_depth, reverse=True)
    nodes = [node for depth in depths for node in functional._nodes_by_depth[depth]]
    return [
        LayerCall(node, tuple(map(id, node.input_tensors)), tuple(map(id, node.outputs)))
        for node in nodes
        if node.operation and not node.is_input
    ]


def ends(functional: Any) -> tuple[list[int], list[int]]:
    """Returns the ids of a functional model's inputs and outputs.

    Args:
        functional: The result of `functional_of`.
    """
    return [id(tensor) for tensor in functional.inputs], [id(t) for t in functional.outputs]


def _flops(node: Any) -> int:
    """Counts what a call computes for one example, in the graph that TensorFlow makes of it."""
    tensors = list(node.input_tensors)
    try:
        specs = [
            tf.TensorSpec([1 if size is None else size for size in t.shape], t.dtype)
            for t in tensors
        ]

        def call(*values: Any) -> Any:
            by_id = {id(t): value for t, value in zip(tensors, values, strict=True)}
            args, kwargs = node.arguments.fill_in(by_id)
            return node.operation(*args, **kwargs)

        traced = tf.function(call, autograph=False).get_concrete_function(*specs)
    except Exception:  # the sizes that it takes are not those of one example
        return 0
    return sum(map(_flops_of_op, traced.graph.get_operations()))


def _flops_of_op(op: Any) -> int:
    shapes = [tensor.shape for tensor in (*op.inputs, *op.outputs)]
    if (
        op.type in _FREE
        or not op.outputs
        or not all(shape.is_fully_defined() for shape in shapes)
    ):
        return 0
    elements = op.outputs[0].shape.num_elements()
    if op.type in _PRODUCTS:
        kernel = op.inputs[1].shape
        return int(
            2 * elements * math.prod(kernel[: -2 if op.type == "DepthwiseConv2dNative" else -1])
        )
    if op.type in _MATRIX_PRODUCTS:
        is_turned = op.node_def.attr["transpose_a"].b or op.node_def.attr["adj_x"].b
        return int(2 * elements * op.inputs[0].shape[-2 if is_turned else -1])
    if op.type == "Einsum":
        given, _ = op.get_attr("equation").decode().split("->")
        sizes: dict[str, int] = {}
        for letters, tensor in zip(given.split(","), op.inputs, strict=True):
            if "." in letters:
                return int(2 * elements)
            sizes |= dict(zip(letters, tensor.shape.as_list(), strict=True))
        return 2 * math.prod(sizes.values())
    return int(elements)


def seed_states(layers: Sequence[Any]) -> set[int]:
    """Collects the ids of the variables that are states of random generators.

    Args:
        layers: `keras.Layer`s or operations.
    """
    parts = [p for la in layers if isinstance(la, keras.Layer) for p in la._flatten_layers()]
    values = keras.tree.flatten([list(vars(part).values()) for part in parts])
    return {id(v.state) for v in values if isinstance(v, keras.random.SeedGenerator)}
