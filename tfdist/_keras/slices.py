"""Sparse gradients: tells whether the rows of shares must be added or concatenated."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

# Ops whose output keeps the distinct numbers of their first input distinct.
_KEEPS_DISTINCT = frozenset(
    {"AddV2", "Cast", "ExpandDims", "GatherV2", "Identity", "Reshape", "Squeeze", "Sub"}
)
_OF_SHAPES = frozenset({"Shape", "ShapeN", "Size", "Rank"})


def has_fixed_rows(gradient: Any) -> bool:
    """Returns whether the rows of a gradient do not depend on examples, such as positions.

    Then each share's rows are sums over its examples, and must be added. If the rows depend
    on the examples, the rows of shares are concatenated, as in one process.

    Args:
        gradient: A gradient that is being traced, dense or `tf.IndexedSlices`.
    """
    if not isinstance(gradient, tf.IndexedSlices) or tf.executing_eagerly():
        return False
    return is_of_no_example(gradient.indices)


def is_of_no_example(tensor: Any) -> bool:
    """Returns whether a tensor is a constant, or made of constants and shapes.

    Args:
        tensor: A tensor that is being traced.
    """
    graph = tensor.graph
    captured = {id(captured) for captured in getattr(graph, "internal_captures", ())}
    stack, visited = [tensor], set()
    while stack:
        tensor = stack.pop()
        if id(tensor) in visited or id(tensor) in captured:
            continue
        visited.add(id(tensor))
        op = tensor.op
        if op.type in _OF_SHAPES:
            continue
        if not op.inputs and op.type != "Const":
            return False  # the share's data
        if any(tensor.dtype in (tf.resource, tf.variant) for tensor in op.inputs):
            return False  # from an iterator or a function
        stack += list(op.inputs)
    return True


def has_unique_rows(gradient: Any) -> bool:
    """Returns whether a gradient has each row once, even if several examples use it.

    A product with a sparse matrix looks up each row once for a whole batch. Then rows that
    several shares have must be added into one.

    Args:
        gradient: As in `has_fixed_rows`.
    """
    if not isinstance(gradient, tf.IndexedSlices) or tf.executing_eagerly():
        return False
    return _is_unique(gradient.indices.op)


def _is_unique(op: Any) -> bool:
    while op.type in _KEEPS_DISTINCT:
        op = op.inputs[0].op
    if op.type == "ConcatV2":  # joins the parts of a split variable
        return all(_is_unique(part.op) for part in list(op.inputs)[:-1])
    return bool(op.type in ("Unique", "UniqueV2"))


def once_each(gradient: Any) -> Any:
    """Adds the rows of a gradient that have the same index.

    Args:
        gradient: `tf.IndexedSlices`.
    """
    ids, segments = tf.unique(gradient.indices)
    values = tf.math.unsorted_segment_sum(gradient.values, segments, tf.size(ids))
    return tf.IndexedSlices(values, ids, gradient.dense_shape)
