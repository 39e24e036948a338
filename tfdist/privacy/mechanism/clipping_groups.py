"""Which rows of a batch are clipped together: each alone, copies of one, or those of a user."""

from __future__ import annotations

import abc
from typing import Any

import tensorflow as tf

Tensor = Any


def begins(groups: Tensor) -> Tensor:
    """Says at which rows groups begin.

    Args:
        groups: A number for each row, the same within a group, shape [rows], not empty.

    Returns:
        int32 of shape [groups], the first 0.
    """
    later = tf.where(groups[1:] != groups[:-1])[:, 0] + 1
    return tf.concat([[0], tf.cast(later, tf.int32)], 0)


class ClippingGroups(abc.ABC):
    """Says which rows make up a unit: what is clipped as one, and may be there or not.

    A unit's rows follow each other.

    Attributes:
        scale: By which the sum of a unit's gradients is multiplied before it is clipped.
        most: The most rows of a unit.
    """

    scale: float = 1.0
    most: int

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
        """Lays a unit's rows one behind the other, with zeros where it has fewer than others.

        Args:
            each: Shape [rows, positions, ...].

        Returns:
            Shape [units, rows of a unit * positions, ...].
        """

    @abc.abstractmethod
    def all_of(self, rows: Tensor) -> Tensor:
        """Says whether all rows of a unit are true.

        Args:
            rows: Bool, shape [rows].

        Returns:
            Bool, shape [units].
        """

    @abc.abstractmethod
    def by_row(self, units: Tensor) -> Tensor:
        """Gives each row what its unit has.

        Args:
            units: Shape [units].

        Returns:
            Shape [rows].
        """


class Alone(ClippingGroups):
    """Every row by itself."""

    most = 1

    def sums(self, each: Tensor) -> Tensor:
        """Gives the rows; see `ClippingGroups`."""
        return each

    def joined(self, each: Tensor) -> Tensor:
        """Gives the rows; see `ClippingGroups`."""
        return each

    def all_of(self, rows: Tensor) -> Tensor:
        """Gives the rows; see `ClippingGroups`."""
        return rows

    def by_row(self, units: Tensor) -> Tensor:
        """Gives the units; see `ClippingGroups`."""
        return units


class CopiesOfExamples(ClippingGroups):
    """So many rows for each example: copies that were augmented, whose mean counts.

    Args:
        copies: Rows of an example.
    """

    def __init__(self, copies: int) -> None:
        self.most, self.scale = copies, 1 / copies

    def sums(self, each: Tensor) -> Tensor:
        """Adds up; see `ClippingGroups`."""
        return tf.reduce_sum(self._split(each), 1)

    def joined(self, each: Tensor) -> Tensor:
        """Lays them behind each other; see `ClippingGroups`."""
        sizes = each.shape[1] if each.shape[1] is not None else tf.shape(each)[1]
        return tf.reshape(each, [-1, self.most * sizes, *each.shape[2:]])

    def all_of(self, rows: Tensor) -> Tensor:
        """Asks all copies; see `ClippingGroups`."""
        return tf.reduce_all(self._split(rows), 1)

    def by_row(self, units: Tensor) -> Tensor:
        """Repeats; see `ClippingGroups`."""
        return tf.repeat(units, self.most)

    def _split(self, each: Tensor) -> Tensor:
        return tf.reshape(each, [-1, self.most, *each.shape[1:]])


class Groups(ClippingGroups):
    """Rows of the same group, any number of them, whose sum counts.

    Args:
        groups: A number for each row, the same within a group and another one in the next,
            shape [rows].
        most: The most examples of a group.
        copies: Rows of an example, as in `CopiesOfExamples`.
    """

    def __init__(self, groups: Tensor, most: int, copies: int = 1) -> None:
        self.most, self.scale = most * copies, 1 / copies
        changes = tf.cast(groups[1:] != groups[:-1], tf.int32)
        self._unit = tf.concat([[0], tf.cumsum(changes)], 0)
        self._count = self._unit[-1] + 1

    @property
    def unit(self) -> Tensor:
        """The unit of each row, counted from 0, shape [rows]."""
        return self._unit

    def sums(self, each: Tensor) -> Tensor:
        """Adds up; see `ClippingGroups`."""
        return tf.math.unsorted_segment_sum(each, self._unit, self._count)

    def joined(self, each: Tensor) -> Tensor:
        """Lays them behind each other; see `ClippingGroups`."""
        rows = tf.shape(self._unit)[0]
        first = tf.math.unsorted_segment_min(tf.range(rows), self._unit, self._count)
        place = tf.range(rows) - tf.gather(first, self._unit)
        places = tf.fill([self._count, tf.reduce_max(place) + 1], rows)
        where = tf.stack([self._unit, place], 1)
        places = tf.tensor_scatter_nd_update(places, where, tf.range(rows))
        nothing = tf.zeros([1, *tf.unstack(tf.shape(each)[1:])], each.dtype)
        found = tf.gather(tf.concat([each, nothing], 0), places)
        return tf.reshape(found, [self._count, -1, *each.shape[2:]])

    def all_of(self, rows: Tensor) -> Tensor:
        """Asks all rows; see `ClippingGroups`."""
        return self.sums(tf.cast(~rows, tf.int32)) == 0

    def by_row(self, units: Tensor) -> Tensor:
        """Gathers; see `ClippingGroups`."""
        return tf.gather(units, self._unit)
