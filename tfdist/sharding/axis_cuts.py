"""How a tensor is cut along one of its axes, for layers that compute in parts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from tfdist.sharding.cuts import Cut
from tfdist.step.state import Sharded

Tensor = Any


@dataclass(frozen=True)
class AxisCut(Cut):
    """The cut of a tensor into equal slices along one axis.

    Replicas r, r + ways, r + 2 * ways and so on have the same slice. So the part of each
    replica is as in a `Cut`, and some parts are equal.

    Attributes:
        axis: The axis, which `ways` divides.
        ways: Number of slices, a divisor of `parts`.
    """

    axis: int = 0
    ways: int = 1

    @property
    def is_by_rows(self) -> bool:
        """Whether a part has whole rows."""
        return self.axis == 0

    @property
    def part_shape(self) -> tuple[int, ...]:
        """The shape of each slice."""
        shape = list(self.shape)
        shape[self.axis] //= self.ways
        return tuple(shape)

    @property
    def part_size(self) -> int:
        """Number of elements of each slice."""
        return math.prod(self.part_shape)

    @property
    def role(self) -> Sharded:
        """The role of a variable that holds a slice."""
        return Sharded(self.shape[0], self.shape, self.axis, self.ways)

    def own(self, whole: Tensor, number: Tensor) -> Tensor:
        """Returns a replica's slice."""
        begin = [tf.constant(0)] * len(self.shape)
        begin[self.axis] = self._member(number) * self.part_shape[self.axis]
        return tf.slice(whole, tf.stack(begin), self.part_shape)

    def slices(self, whole: Tensor) -> Tensor:
        """Returns the slices along a new axis 0, shape [ways, *part_shape].

        Args:
            whole: The tensor.
        """
        return tf.stack(tf.split(whole, self.ways, self.axis))

    def stacked(self, whole: Tensor) -> Tensor:
        """Returns the slices of all replicas as rows, shape [parts, part_size]."""
        rows = tf.reshape(self.slices(whole), [self.ways, self.part_size])
        return tf.tile(rows, [self.parts // self.ways, 1])

    def joined(self, stacked: Tensor) -> Tensor:
        """Returns the tensor; the inverse of `stacked`."""
        slices = tf.reshape(stacked[: self.ways], [self.ways, *self.part_shape])
        return tf.concat(tf.unstack(slices), self.axis)

    def joined_arrays(self, parts: Any) -> Any:
        """Returns the tensor of the arrays of all replicas."""
        slices = [np.reshape(part, self.part_shape) for part in parts[: self.ways]]
        return np.concatenate(slices, self.axis)

    def own_rows(self, slices: Tensor, number: Tensor) -> Tensor:
        """Returns what a gradient of rows has in a replica's slice."""
        indices = tf.cast(slices.indices, tf.int64)
        shape = tf.constant(self.part_shape, tf.int64)
        if self.axis > 0:
            columns = self.part_shape[self.axis]
            begin = [tf.constant(0)] * len(self.shape)
            begin[self.axis] = self._member(number) * columns
            sizes = [-1, *self.part_shape[1:]]
            values = tf.slice(slices.values, tf.stack(begin), sizes)
            return tf.IndexedSlices(values, indices, shape)
        indices -= tf.cast(self._member(number) * self.part_shape[0], tf.int64)
        is_own = (indices >= 0) & (indices < self.part_shape[0])
        return tf.IndexedSlices(
            tf.boolean_mask(slices.values, is_own), tf.boolean_mask(indices, is_own), shape
        )

    def _member(self, number: Tensor) -> Tensor:
        return tf.cast(number, tf.int32) % self.ways
