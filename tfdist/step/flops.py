"""What a step computes, counted in its graph: operations, bytes moved, and ops."""

from __future__ import annotations

import math
from typing import Any

from tfdist._keras import StepGraph
from tfdist.cluster.cost import Work
from tfdist.step.liveness import ALIASES, OF_SHAPES, OUTSIDE, needed_ops

_BACKWARD_TO_INPUT = frozenset(
    {"Conv2DBackpropInput", "Conv3DBackpropInputV2", "DepthwiseConv2dNativeBackpropInput"}
)
_BACKWARD_TO_FILTER = frozenset(
    {"Conv2DBackpropFilter", "Conv3DBackpropFilterV2", "DepthwiseConv2dNativeBackpropFilter"}
)
_FREE = ALIASES | OF_SHAPES | OUTSIDE | {"Const", "NoOp", "Pack", "StridedSlice"}


def work_of(step: StepGraph) -> Work:
    """Counts the work of a step.

    A multiplication and an addition count as two operations. Loops count once, as their number
    of turns is not in the graph.

    Args:
        step: The graph of the step, with known shapes.

    Returns:
        The work of the forward and the backward pass, without the optimizer's update.
    """
    flops, moved, ops = 0.0, 0.0, 0
    for _, op in needed_ops(step):
        if op.type in _FREE:
            continue
        flops += flops_of(op)
        moved += sum(_bytes(tensor) for tensor in (*op.inputs, *op.outputs))
        ops += 1
    return Work(flops, moved, ops)


def flops_of(op: Any) -> float:
    """Counts the operations of a matrix product or a convolution; 0 for other ops.

    Args:
        op: A `tf.Operation`.
    """
    kind = op.type
    if kind == "MatMul":
        contracted = _sizes(op.inputs[0])[0 if op.get_attr("transpose_a") else 1]
        return 2.0 * _elements(op.outputs[0]) * contracted
    if kind.startswith("BatchMatMul"):
        contracted = _sizes(op.inputs[0])[-2 if op.get_attr("adj_x") else -1]
        return 2.0 * _elements(op.outputs[0]) * contracted
    if kind == "Einsum":
        return _flops_of_einsum(op)
    if kind in ("Conv2D", "Conv3D"):
        # Of grouped convolutions, the filter has the channels of one group.
        return 2.0 * _elements(op.outputs[0]) * math.prod(_sizes(op.inputs[1])[:-1])
    if kind == "DepthwiseConv2dNative":
        return 2.0 * _elements(op.outputs[0]) * math.prod(_sizes(op.inputs[1])[:2])
    spatial = slice(2) if kind.startswith("Depthwise") else slice(-1)
    if kind in _BACKWARD_TO_INPUT:
        return 2.0 * _elements(op.inputs[2]) * math.prod(_sizes(op.inputs[1])[spatial])
    if kind in _BACKWARD_TO_FILTER:
        return 2.0 * _elements(op.inputs[2]) * math.prod(_sizes(op.outputs[0])[spatial])
    return 0.0


def _flops_of_einsum(op: Any) -> float:
    equation = op.get_attr("equation").decode()
    sizes: dict[str, int] = {}
    for labels, tensor in zip(equation.partition("->")[0].split(","), op.inputs, strict=True):
        own = _sizes(tensor)
        if "..." in labels or len(labels) != len(own):
            return 0.0
        sizes.update(zip(labels, own, strict=True))
    return 2.0 * math.prod(sizes.values()) if len(op.inputs) > 1 else 0.0


def _sizes(tensor: Any) -> list[int]:
    return [] if tensor.shape.rank is None else [size or 0 for size in tensor.shape]


def _elements(tensor: Any) -> int:
    return tensor.shape.num_elements() or 0 if tensor.shape.rank is not None else 0


def _bytes(tensor: Any) -> int:
    return _elements(tensor) * int(tensor.dtype.size)
