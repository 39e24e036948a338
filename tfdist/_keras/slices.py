"""Gradients of rows: whether the rows are those of a batch's examples, or the same for all."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

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
