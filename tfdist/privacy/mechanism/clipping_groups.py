"""Groups of rows that are clipped together: single rows, copies of an example, or users."""

from __future__ import annotations

import abc
from typing import Any

import tensorflow as tf

Tensor = Any


def begins(groups: Tensor) -> Tensor:
    """Returns the first row of each group.

    Args:
        groups: The number of each row's group, shape [rows]. It must not be empty.

    Returns:
        int32 of shape [groups]. The first one is 0.
    """
    changes = tf.where(groups[1:] != groups[:-1])[:, 0] + 1
    return tf.concat([[0], tf.cast(changes, tf.int32)], 0)


class ClippingGroups(abc.ABC):
    """Groups rows into units. The gradients of a unit are summed and clipped together.

    A unit is what differs between neighbouring data sets: an example or a user. Its rows are
    next to each other.

    Attributes:
        scale: The factor of the sum of a unit's gradients, before it is clipped.
        max_rows: The most rows of a unit.
    """

    scale: float = 1.0
    max_rows: int

    @abc.abstractmethod
    def sums(self, each: Tensor) -> Tensor:
        """Adds up a unit's rows.

        Args:
            each: Shape [rows, ...].

        Returns:
            Shape [units, ...].
        """

    @abc.abstractmethod
    def joined(self, each: Tensor) -> Tensor:
        """Concatenates a unit's rows, padded with zeros to the largest unit.

        Args:
            each: Shape [rows, positions, ...].

        Returns:
            Shape [units, rows of a unit * positions, ...].
        """

    @abc.abstractmethod
    def all_of(self, rows: Tensor) -> Tensor:
        """Returns whether all rows of each unit are true.

        Args:
            rows: Bool, shape [rows].

        Returns:
            Bool, shape [units].
        """

    @abc.abstractmethod
    def by_row(self, units: Tensor) -> Tensor:
        """Gives each row the value of its unit.

        Args:
            units: Shape [units].

        Returns:
            Shape [rows].
        """


class Alone(ClippingGroups):
    """Each row is a unit."""

    max_rows = 1

    def sums(self, each: Tensor) -> Tensor:
        """Returns its argument; see `ClippingGroups`."""
        return each

    def joined(self, each: Tensor) -> Tensor:
        """Returns its argument; see `ClippingGroups`."""
        return each

    def all_of(self, rows: Tensor) -> Tensor:
        """Returns its argument; see `ClippingGroups`."""
        return rows

    def by_row(self, units: Tensor) -> Tensor:
        """Returns its argument; see `ClippingGroups`."""
        return units


class CopiesOfExamples(ClippingGroups):
    """The augmented copies of an example are a unit. Their mean gradient is clipped.

    Args:
        copies: The number of rows of an example.
    """

    def __init__(self, copies: int) -> None:
        self.max_rows, self.scale = copies, 1 / copies

    def sums(self, each: Tensor) -> Tensor:
        """Sums; see `ClippingGroups`."""
        return tf.reduce_sum(self._split(each), 1)

    def joined(self, each: Tensor) -> Tensor:
        """Concatenates rows; see `ClippingGroups`."""
        sizes = each.shape[1] if each.shape[1] is not None else tf.shape(each)[1]
        return tf.reshape(each, [-1, self.max_rows * sizes, *each.shape[2:]])

    def all_of(self, rows: Tensor) -> Tensor:
        """Combines all copies; see `ClippingGroups`."""
        return tf.reduce_all(self._split(rows), 1)

    def by_row(self, units: Tensor) -> Tensor:
        """Repeats; see `ClippingGroups`."""
        return tf.repeat(units, self.max_rows)

    def _split(self, each: Tensor) -> Tensor:
        return tf.reshape(each, [-1, self.max_rows, *each.shape[1:]])


class Groups(ClippingGroups):
    """The rows of a group, such as a user, are a unit. The sum of their gradients is clipped.

    Args:
        groups: The number of each row's group, shape [rows]. Neighbouring groups have different
            numbers.
        max_rows: The most examples of a group.
        copies: As in `CopiesOfExamples`.
    """

    def __init__(self, groups: Tensor, max_rows: int, copies: int = 1) -> None:
        self.max_rows, self.scale = max_rows * copies, 1 / copies
        # The rows of a unit are neighbours, so the number of changes before a row is its unit.
        changes = tf.cast(groups[1:] != groups[:-1], tf.int32)
        self._unit = tf.concat([[0], tf.cumsum(changes)], 0)
        self._count = self._unit[-1] + 1

    @property
    def unit(self) -> Tensor:
        """The unit of each row, counted from 0, shape [rows]."""
        return self._unit

    def sums(self, each: Tensor) -> Tensor:
        """Sums; see `ClippingGroups`."""
        return tf.math.unsorted_segment_sum(each, self._unit, self._count)

    def joined(self, each: Tensor) -> Tensor:
        """Concatenates rows; see `ClippingGroups`."""
        rows = tf.shape(self._unit)[0]
        first = tf.math.unsorted_segment_min(tf.range(rows), self._unit, self._count)
        place = tf.range(rows) - tf.gather(first, self._unit)
        # A table of row numbers by unit and place. Empty places have the number of a zero row.
        table = tf.fill([self._count, tf.reduce_max(place) + 1], rows)
        table = tf.tensor_scatter_nd_update(
            table, tf.stack([self._unit, place], 1), tf.range(rows)
        )
        zero_row = tf.zeros([1, *tf.unstack(tf.shape(each)[1:])], each.dtype)
        joined = tf.gather(tf.concat([each, zero_row], 0), table)
        return tf.reshape(joined, [self._count, -1, *each.shape[2:]])

    def all_of(self, rows: Tensor) -> Tensor:
        """Combines all rows; see `ClippingGroups`."""
        return self.sums(tf.cast(~rows, tf.int32)) == 0

    def by_row(self, units: Tensor) -> Tensor:
        """Gathers; see `ClippingGroups`."""
        return tf.gather(units, self._unit)
