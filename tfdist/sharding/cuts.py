"""How a tensor is cut into equal parts, one for each replica."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from tfdist.step.state import Sharded

Tensor = Any
# A part of fewer elements saves nothing, and costs as many operations as a large one.
_FEWEST = 8
# Rows of a part. Fewer rows would need more than 1/16 of padding.
_FEWEST_ROWS = 16


@dataclass(frozen=True)
class Cut:
    """The cut of a tensor. Its elements are dealt out in their order, `part_size` to each part.

    A tensor of many rows is cut between rows. Then a gradient that has only some rows needs no
    change but the number of each row. Padding follows the last element.

    Attributes:
        shape: The tensor's shape.
        parts: Number of parts.
    """

    shape: tuple[int, ...]
    parts: int

    @property
    def size(self) -> int:
        """Number of elements of the tensor."""
        return math.prod(self.shape)

    @property
    def is_by_rows(self) -> bool:
        """Whether the cuts are between rows."""
        return len(self.shape) > 1 and self.shape[0] >= _FEWEST_ROWS * self.parts

    @property
    def part_shape(self) -> tuple[int, ...]:
        """The shape of each part."""
        if self.is_by_rows:
            return (-(-self.shape[0] // self.parts), *self.shape[1:])
        return (-(-self.size // self.parts),)

    @property
    def part_size(self) -> int:
        """Number of elements of each part."""
        return math.prod(self.part_shape)

    @property
    def role(self) -> Sharded:
        """The role of a variable that holds a part."""
        return Sharded(self.shape[0] if self.is_by_rows else self.size, self.shape)

    def own(self, whole: Tensor, number: Tensor) -> Tensor:
        """Returns a part.

        Args:
            whole: The tensor.
            number: The part's number, an integer or an integer tensor.
        """
        flat = tf.reshape(whole, [-1])
        begin = tf.cast(number, tf.int32) * self.part_size
        if self.size == self.part_size * self.parts:
            part = tf.slice(flat, [begin], [self.part_size])
        else:
            begin = tf.minimum(begin, self.size)
            size = tf.minimum(self.part_size, self.size - begin)
            part = tf.pad(tf.slice(flat, [begin], [size]), [[0, self.part_size - size]])
        return tf.reshape(part, self.part_shape)

    def stacked(self, whole: Tensor) -> Tensor:
        """Returns all parts as rows, shape [parts, part_size].

        Args:
            whole: The tensor.
        """
        flat = tf.reshape(whole, [-1])
        padding = self.part_size * self.parts - self.size
        flat = tf.pad(flat, [[0, padding]]) if padding else flat
        return tf.reshape(flat, [self.parts, self.part_size])

    def joined(self, stacked: Tensor) -> Tensor:
        """Returns the tensor; the inverse of `stacked`.

        Args:
            stacked: All parts, shape [parts, part_size].
        """
        return tf.reshape(tf.reshape(stacked, [-1])[: self.size], self.shape)

    def joined_arrays(self, parts: Any) -> Any:
        """Returns the tensor of some arrays.

        Args:
            parts: All parts, NumPy arrays of `part_shape`.
        """
        flat = np.concatenate([np.reshape(part, [-1]) for part in parts])
        return flat[: self.size].reshape(self.shape)

    def own_rows(self, slices: Tensor, number: Tensor) -> Tensor:
        """Returns the rows of a part. A row that occurs several times stays so.

        Args:
            slices: `tf.IndexedSlices` of the tensor.
            number: As in `own`.
        """
        values, indices = slices.values, tf.cast(slices.indices, tf.int64)
        if not self.is_by_rows:
            row_size = math.prod(self.shape[1:])
            elements = indices[:, None] * row_size + tf.range(row_size, dtype=tf.int64)
            values, indices = tf.reshape(values, [-1]), tf.reshape(elements, [-1])
        rows = self.part_shape[0]
        indices -= tf.cast(number, tf.int64) * rows
        is_own = (indices >= 0) & (indices < rows)
        return tf.IndexedSlices(
            tf.boolean_mask(values, is_own),
            tf.boolean_mask(indices, is_own),
            tf.constant(self.part_shape, tf.int64),
        )


def cut_of(shape: tuple[int, ...], parts: int) -> Cut | None:
    """Returns the cut of a tensor, or None if it is too small to be cut.

    Args:
        shape: The tensor's shape.
        parts: Number of parts.
    """
    return Cut(shape, parts) if math.prod(shape) >= _FEWEST * parts else None
