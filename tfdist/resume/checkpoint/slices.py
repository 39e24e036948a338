"""Parts of a tensor as slices, the rectangles that TensorFlow's checkpoints are made of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from tfdist.step.state import Sharded

Tensor = Any
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Slice:
    """A rectangle in a tensor.

    Attributes:
        shape: The tensor's shape.
        begin: The first index on each axis.
        sizes: Number of indices on each axis.
    """

    shape: Shape
    begin: Shape
    sizes: Shape

    @property
    def spec(self) -> str:
        """The text by which TensorFlow knows it, as in `tf.raw_ops.SaveV2`.

        Example:
            >>> Slice((7, 5), (0, 2), (7, 3)).spec
            '7 5 -:2,3'
        """
        axes = zip(self.shape, self.begin, self.sizes, strict=True)
        slices = ("-" if size == length else f"{at},{size}" for length, at, size in axes)
        return f"{' '.join(map(str, self.shape))} {':'.join(slices)}"


def slices_of_run(shape: Shape, begin: int, end: int) -> list[Slice]:
    """Returns a run of elements, in the order of elements, as the fewest slices.

    Args:
        shape: The tensor's shape.
        begin: Number of the first element.
        end: Number of the element after the last one.

    Example:
        >>> [s.spec for s in slices_of_run((7, 5), 3, 16)]
        ['7 5 0,1:3,2', '7 5 1,2:-', '7 5 3,1:0,1']
    """
    return [Slice(shape, at, sizes) for at, sizes in _boxes(shape, begin, end)]


def _boxes(shape: Shape, begin: int, end: int) -> Iterator[tuple[Shape, Shape]]:
    if begin >= end:
        return
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])
    first, last = -(-begin // row), end // row  # whole rows
    if first > last:  # all in one row
        yield from _in_row(shape, last, begin - last * row, end - last * row)
        return
    yield from _in_row(shape, first - 1, begin - (first - 1) * row, row)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    yield from _in_row(shape, last, 0, end - last * row)


def _in_row(shape: Shape, row: int, begin: int, end: int) -> Iterator[tuple[Shape, Shape]]:
    for at, sizes in _boxes(shape[1:], begin, end):
        yield (row, *at), (1, *sizes)


def whole_shape(role: Sharded, part_shape: Shape) -> Shape:
    """Returns the shape of a tensor that is in parts.

    Args:
        role: The role of the variables that hold the parts.
        part_shape: The shape of a part.
    """
    return (role.rows, *part_shape[1:]) if role.shape is None else role.shape


def slices_of_part(role: Sharded, part_shape: Shape, number: int) -> list[Slice]:
    """Returns the slices of a tensor that are in a part. What is left of the part is padding.

    Args:
        role: The role of the variables that hold the parts.
        part_shape: The shape of a part.
        number: The part's number.
    """
    shape = whole_shape(role, part_shape)
    if role.ways:
        corner = [0] * len(shape)
        corner[role.axis] = number % role.ways * part_shape[role.axis]
        return [Slice(shape, tuple(corner), tuple(part_shape))]
    size, length = math.prod(shape), math.prod(part_shape)
    begin = min(number * length, size)
    return slices_of_run(shape, begin, min(begin + length, size))


def cut(part: Tensor, slices: Sequence[Slice]) -> list[Tensor]:
    """Cuts a part into the tensors of its slices.

    Args:
        part: The part.
        slices: The slices, from `slices_of_part`.
    """
    flat, begin, tensors = tf.reshape(part, [-1]), 0, []
    for one in slices:
        size = math.prod(one.sizes)
        tensors.append(tf.reshape(flat[begin : begin + size], one.sizes))
        begin += size
    return tensors


def joined(tensors: Sequence[Any], part_shape: Shape, dtype: Any) -> Any:
    """Returns a part as an array, padded with zeros; the inverse of `cut`.

    Args:
        tensors: The arrays of its slices.
        part_shape: The shape of the part.
        dtype: Its NumPy dtype.
    """
    part, begin = np.zeros(math.prod(part_shape), dtype), 0
    for tensor in tensors:
        part[begin : begin + tensor.size] = np.reshape(tensor, [-1])
        begin += tensor.size
    return part.reshape(part_shape)
