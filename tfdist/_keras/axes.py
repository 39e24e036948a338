"""From which axes of other tensors a size follows, as a graph shows."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

Tensor = Any
_SAME = frozenset({"Cast", "Identity", "Squeeze", "Reshape", "ExpandDims"})
_OF_BOTH = frozenset({"AddV2", "FloorDiv", "FloorMod", "Maximum", "Minimum", "Mul", "Sub"})


def first_of(shape: Any) -> Any:
    """Returns the size of the first axis of a shape.

    Args:
        shape: A tensor, or a sequence of numbers and scalar tensors.

    Returns:
        A number, a scalar tensor, or None if the shape has none or it is not known.
    """
    if not tf.is_tensor(shape):
        return shape[0] if len(shape) else None
    while shape.op.type in ("Cast", "Identity"):
        shape = shape.op.inputs[0]
    return shape.op.inputs[0] if shape.op.type == "Pack" else None


def is_of_other_axes(size: Any) -> bool:
    """Returns whether a size is known to follow from no first axis of a tensor.

    Args:
        size: The result of `first_of`, in a graph.

    Returns:
        False if that is not known.
    """
    axes = _axes(size)
    return bool(axes) and 0 not in axes and None not in axes


def _axes(size: Any) -> set[int | None]:
    """Lists the axes whose sizes a size follows from. None stands for anything else."""
    if isinstance(size, int):
        return set()
    if not tf.is_tensor(size) or isinstance(size, tf.__internal__.EagerTensor):
        return {None}
    if tf.get_static_value(size) is not None:
        return _axes_of_slice(size.op) if size.op.type == "StridedSlice" else set()
    if size.op.type in _SAME:
        return _axes(size.op.inputs[0])
    if size.op.type in _OF_BOTH:
        return _axes(size.op.inputs[0]) | _axes(size.op.inputs[1])
    return _axes_of_slice(size.op) if size.op.type == "StridedSlice" else {None}


def _axes_of_slice(op: Any) -> set[int | None]:
    """Returns the axis that an element of a tensor's shape is of."""
    shape, begin = op.inputs[0].op, tf.get_static_value(op.inputs[1])
    while shape.type in ("Cast", "Identity"):
        shape = shape.inputs[0].op
    is_element = op.get_attr("shrink_axis_mask") == 1
    if shape.type != "Shape" or begin is None or len(begin) != 1 or not is_element:
        return {None}
    axis, rank = int(begin[0]), shape.inputs[0].shape.rank
    if axis < 0 and rank is None:
        return {None}
    return {axis if axis >= 0 else axis + int(rank)}
