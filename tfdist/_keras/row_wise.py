"""Proves that each row of a mapped batch follows from the same row of the batch alone.

The graph of the function is read, nothing is tried: what a batch shows by chance says nothing
of other batches. Only operations that are known to keep rows apart pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

# One number for one number.
_UNARY = frozenset(
    {
        "Abs", "Cast", "Ceil", "Cos", "Elu", "Exp", "Floor", "Identity", "Inv", "IsFinite",
        "IsInf", "IsNan", "Log", "Log1p", "LogicalNot", "Neg", "OnesLike", "Reciprocal", "Relu",
        "Relu6", "Round", "Rsqrt", "Selu", "Sigmoid", "Sign", "Sin", "Softplus", "Sqrt",
        "Square", "StopGradient", "StringToNumber", "Tanh", "ZerosLike",
    }
)  # fmt: skip
_BROADCAST = frozenset(
    {
        "Add", "AddV2", "ClipByValue", "Div", "DivNoNan", "Equal", "FloorDiv", "FloorMod",
        "Greater", "GreaterEqual", "Less", "LessEqual", "LogicalAnd", "LogicalOr", "Maximum",
        "Minimum", "Mod", "Mul", "MulNoNan", "NotEqual", "Pow", "RealDiv", "SelectV2",
        "SquaredDifference", "Sub", "TruncateDiv", "TruncateMod",
    }
)  # fmt: skip
_OF_SIZES = frozenset({"Rank", "Shape", "Size"})
_REDUCE = frozenset({"All", "Any", "ArgMax", "ArgMin", "Max", "Mean", "Min", "Prod", "Sum"})
# The first input has rows, all others are the same for every batch.
_FIRST_HAS_ROWS = frozenset({"BiasAdd", "MatMul", "ResizeBilinear", "ResizeNearestNeighbor"})
_OF_LAST_AXIS = frozenset({"LogSoftmax", "Softmax"})


def mixing_op(function: Any) -> str | None:
    """Names an operation that is not known to keep the rows of a batch apart.

    Args:
        function: The function of a dataset that maps batches: each of its arguments has rows
            as its first axis.

    Returns:
        The type of the operation; None if each row of an output follows from the same rows of
        the arguments.
    """
    graph = function.graph
    captured = {inner.name for _, inner in graph.captures}
    # The rank of what has rows; tensors that are not named are the same for every batch.
    ranks = {t.name: t.shape.rank for t in graph.inputs if t.name not in captured}
    if None in ranks.values() or 0 in ranks.values():
        return "Placeholder"
    for op in graph.get_operations():
        if op.type in _OF_SIZES or not any(t.name in ranks for t in op.inputs):
            continue  # the same for every batch of as many rows
        if not _keeps_rows(op, ranks):
            return str(op.type)
        for output in op.outputs:
            if output.shape.rank in (None, 0):
                return str(op.type)
            ranks[output.name] = output.shape.rank
    return None


def _keeps_rows(op: Any, ranks: dict[str, int]) -> bool:
    kind, inputs = op.type, list(op.inputs)
    has_rows = [t.name in ranks for t in inputs]
    if kind in _UNARY:
        return True
    if kind in _BROADCAST:
        return _broadcasts_by_row(inputs, ranks)
    first_alone = has_rows[0] and not any(has_rows[1:])
    if kind in _FIRST_HAS_ROWS:
        return first_alone and (kind != "MatMul" or not bool(op.get_attr("transpose_a")))
    if kind in _OF_LAST_AXIS:
        return bool(inputs[0].shape.rank >= 2)
    if kind == "ConcatV2":
        *parts, axis = inputs
        same = {t.shape.rank for t in parts}
        return all(has_rows[:-1]) and len(same) == 1 and _avoids_rows(axis, same.pop())
    if kind == "Pack":
        same = {t.shape.rank for t in inputs}
        axis = op.get_attr("axis") % (inputs[0].shape.rank + 1)
        return all(has_rows) and len(same) == 1 and axis >= 1
    if kind in ("GatherV2", "ResourceGather", "LookupTableFindV2"):
        return _looks_up(op, has_rows)
    if not first_alone:
        return False
    return _keeps_first_axis(op, inputs)


def _keeps_first_axis(op: Any, inputs: Sequence[Any]) -> bool:
    """Tells it of operations that change the shape of one tensor with rows."""
    kind, rank = op.type, inputs[0].shape.rank
    if kind in _REDUCE:
        return _avoids_rows(inputs[1], rank)
    if kind == "OneHot":
        axis = op.get_attr("axis")
        return bool(axis == -1 or axis >= 1)
    if kind == "ExpandDims":
        return _avoids_rows(inputs[1], rank + 1)
    if kind == "Squeeze":
        axes = list(op.get_attr("squeeze_dims"))
        return bool(axes) and all(axis % rank >= 1 for axis in axes)
    if kind == "Transpose":
        order = _constant(inputs[1])
        return order is not None and int(order.ravel()[0]) == 0
    if kind == "Reshape":
        before, after = inputs[0].shape[1:], op.outputs[0].shape[1:]
        known = before.is_fully_defined() and after.is_fully_defined()
        # As many numbers for each row: so rows stay what they are.
        return bool(known and before.num_elements() == after.num_elements())
    if kind == "StridedSlice":
        strides = _constant(inputs[3])
        whole = op.get_attr("begin_mask") & 1 and op.get_attr("end_mask") & 1
        moves_axes = op.get_attr("ellipsis_mask") or op.get_attr("new_axis_mask") & 1
        drops_rows = op.get_attr("shrink_axis_mask") & 1
        keeps = whole and not moves_axes and not drops_rows
        return bool(keeps and strides is not None and strides[0] == 1)
    return False


def _broadcasts_by_row(inputs: Sequence[Any], ranks: dict[str, int]) -> bool:
    """Tells whether rows meet rows: what has rows has the same rank, the rest no higher one."""
    with_rows = {t.shape.rank for t in inputs if t.name in ranks}
    others = [t.shape.rank for t in inputs if t.name not in ranks]
    if len(with_rows) != 1 or None in others:
        return False
    (rank,) = with_rows
    return all(other <= rank for other in others)


def _looks_up(op: Any, has_rows: Sequence[bool]) -> bool:
    """Tells whether rows choose from a table that is the same for every batch."""
    if op.type == "GatherV2":
        axis = _constant(op.inputs[2])
        whole = op.get_attr("batch_dims") == 0 and axis is not None and int(axis) == 0
        return list(has_rows) == [False, True, False] and whole
    if op.type == "ResourceGather":
        return list(has_rows) == [False, True] and op.get_attr("batch_dims") == 0
    return list(has_rows) == [False, True, False]


def _avoids_rows(axis: Any, rank: int) -> bool:
    """Tells whether axes are known, and none of them is the first."""
    known = _constant(axis)
    if known is None or not known.size:
        return False
    return bool(np.all(known.ravel() % rank >= 1))


def _constant(tensor: Any) -> Any:
    value = tf.get_static_value(tensor)
    return None if value is None else np.asarray(value)
