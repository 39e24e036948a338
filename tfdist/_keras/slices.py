"""Gradients of rows: whose they are, and how the rows of shares add up."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

# Their first input's numbers, moved, chosen from or added to.
_PASSES_ON = frozenset(
    {"AddV2", "Cast", "ExpandDims", "GatherV2", "Identity", "Reshape", "Squeeze", "Sub"}
)
_OF_SHAPES = frozenset({"Shape", "ShapeN", "Size", "Rank"})


def has_fixed_rows(gradient: Any) -> bool:
    """Tells whether a gradient has rows that no example chose, such as those of positions.

    Then each share's rows are sums over its examples, to be added up; where examples chose
    them, rows of shares stand next to each other, as they would in one process.

    Args:
        gradient: A gradient that is traced; dense, or `tf.IndexedSlices`.
    """
    if not isinstance(gradient, tf.IndexedSlices) or tf.executing_eagerly():
        return False
    graph = gradient.indices.graph
    captured = {id(tensor) for tensor in getattr(graph, "internal_captures", ())}
    waiting, seen = [gradient.indices], set()
    while waiting:
        tensor = waiting.pop()
        if id(tensor) in seen or id(tensor) in captured:
            continue
        seen.add(id(tensor))
        op = tensor.op
        if op.type in _OF_SHAPES:
            continue
        if not op.inputs and op.type != "Const":
            return False  # the share's data
        if any(given.dtype in (tf.resource, tf.variant) for given in op.inputs):
            return False  # an iterator's, or what a function gave
        waiting += list(op.inputs)
    return True


def has_unique_rows(gradient: Any) -> bool:
    """Tells whether a gradient has each row once, whichever examples chose it.

    A product with a sparse matrix looks up each row once for all of a batch. Then rows that
    several shares have must be one again.

    Args:
        gradient: As in `has_fixed_rows`.
    """
    if not isinstance(gradient, tf.IndexedSlices) or tf.executing_eagerly():
        return False
    return _is_unique(gradient.indices.op)


def _is_unique(op: Any) -> bool:
    while op.type in _PASSES_ON:
        op = op.inputs[0].op
    if op.type == "ConcatV2":  # of the parts of a variable on several servers
        return all(_is_unique(part.op) for part in list(op.inputs)[:-1])
    return bool(op.type in ("Unique", "UniqueV2"))


def once_each(gradient: Any) -> Any:
    """Adds up the rows of a gradient that are of one index.

    Args:
        gradient: `tf.IndexedSlices`.
    """
    ids, places = tf.unique(gradient.indices)
    values = tf.math.unsorted_segment_sum(gradient.values, places, tf.size(ids))
    return tf.IndexedSlices(values, ids, gradient.dense_shape)
