"""Tensors of a team: replicas that compute a layer together, each with a part of its weights.

(Shoeybi et al., "Megatron-LM", 2019; Korthikanti et al., "Reducing Activation Recomputation in
Large Transformer Models", 2022, for the reductions that leave each replica a part of the rows.)

Each replica has its own rows of the batch. A layer in parts needs the rows of the whole team. A
tensor is in one of three forms:

=========  =================================================================================
form       what a replica has
=========  =================================================================================
rows       its own rows, with all columns: the usual form
columns    the rows of the team, with its own columns
summands   the rows of the team, with all columns; the sum over the team is the value
=========  =================================================================================

Rows that are fewer than those of another member are filled up. What is computed of the rows
that fill is dropped, and has a gradient of 0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import tensorflow as tf
from keras.src.backend.common import global_state as _global_state

from tfdist._keras.replica import Tensor, current_batch
from tfdist._keras.slices import is_of_no_example


class Links(Protocol):
    """The collectives of a team."""

    @property
    def ways(self) -> int:
        """Number of members."""

    def member(self) -> Tensor:
        """Returns the running replica's number in its team."""

    def stack(self, part: Tensor) -> Tensor:
        """Stacks a tensor of every member, shape [ways, ...]."""

    def swap(self, stacked: Tensor) -> Tensor:
        """Sends row i of a tensor to member i, and returns the rows received."""

    def sum_in_team(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over the team."""


@dataclass(frozen=True)
class Columns:
    """The columns that a replica has of a tensor.

    Attributes:
        team: The team.
        axis: The axis of the columns.
    """

    team: Team
    axis: int

    def draw(self, numbers: Callable[[Tensor, Tensor], Tensor], shape: Tensor) -> Tensor:
        """Draws the random numbers that one process would draw, for these rows and columns.

        Args:
            numbers: Draws rows for a shape and the number of the first row.
            shape: int64, that of the replica's tensor.
        """
        ways, axis = self.team.links.ways, self.axis % shape.shape[0]
        sizes = tf.unstack(shape)
        sizes[0] //= ways
        sizes[axis] *= ways
        repeats = sizes[0] // tf.cast(self.team.most, tf.int64)
        whole = tf.stack(sizes)
        of_members = [numbers(whole, first * repeats) for first in tf.unstack(self.team.first)]
        return self.team.own(tf.concat(of_members, 0), axis)


@dataclass(frozen=True)
class Team:
    """The running replica's team in one step.

    Attributes:
        links: Its collectives.
        rows: Scalar int32: rows of the replica's share, at least 1.
        most: Scalar int32: rows of the largest share of the team.
        first: Shape [ways], int64: the number of the first row of each member's share.
    """

    links: Links
    rows: Tensor
    most: Tensor
    first: Tensor

    def own(self, tensor: Tensor, axis: int) -> Tensor:
        """Returns the replica's columns.

        Args:
            tensor: With all columns.
            axis: The axis of the columns.
        """
        pieces = tf.split(tensor, self.links.ways, axis)
        return tf.gather(tf.stack(pieces), self.links.member())

    def gathered(self, rows: Tensor) -> Tensor:
        """Gathers the rows of the team. The gradients of all members are summed.

        Args:
            rows: The replica's rows.
        """
        count, most = self._counts(rows)

        @tf.custom_gradient  # type: ignore[untyped-decorator]
        def enter(own: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
            return self._stacked(own, most), lambda dy: self._summed(dy, count, most)

        if rows.dtype.size < 4 and not rows.dtype.is_floating:  # collectives do not know these
            return tf.cast(self.gathered(tf.cast(rows, tf.int32)), rows.dtype)
        return enter(rows) if rows.dtype.is_floating else self._stacked(rows, most)

    def summed(self, summands: Tensor) -> Tensor:
        """Sums what the members have, and returns the replica's rows of the sum.

        Args:
            summands: The rows of the team.
        """
        count, most = self._counts_of_team(summands)

        @tf.custom_gradient  # type: ignore[untyped-decorator]
        def leave(parts: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
            return (
                self._summed(parts, count, most),
                lambda dy: self._stacked(dy, most, is_gradient=True),
            )

        return leave(summands)

    def summed_copies(self, summands: Tensor) -> Tensor:
        """Sums what the members have. Each gets all of the sum, which all use.

        Args:
            summands: A tensor that depends on no example.
        """

        @tf.custom_gradient  # type: ignore[untyped-decorator]
        def leave(parts: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
            return self.links.sum_in_team(parts), self.links.sum_in_team

        return leave(summands)

    def in_columns(self, rows: Tensor, axis: int) -> Tensor:
        """Exchanges the replica's rows for its columns of the team's rows.

        Args:
            rows: The replica's rows.
            axis: The axis of the columns.
        """
        count, most = self._counts(rows)
        axis %= len(rows.shape)

        @tf.custom_gradient  # type: ignore[untyped-decorator]
        def enter(own: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
            return (
                self._rows_to_columns(_filled(own, most), axis),
                lambda dy: self._columns_to_rows(dy, axis, count, most),
            )

        return enter(rows)

    def in_rows(self, columns: Tensor, axis: int) -> Tensor:
        """Exchanges the replica's columns for its rows; the inverse of `in_columns`.

        Args:
            columns: The replica's columns.
            axis: Their axis.
        """
        count, most = self._counts_of_team(columns)
        axis %= len(columns.shape)

        @tf.custom_gradient  # type: ignore[untyped-decorator]
        def leave(own: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
            return (
                self._columns_to_rows(own, axis, count, most),
                lambda dy: self._rows_to_columns(_filled(dy, most, with_zeros=True), axis),
            )

        return leave(columns)

    # --- the collectives ----------------------------------------------------------------------

    def _stacked(self, own: Tensor, most: Any, is_gradient: bool = False) -> Tensor:
        stacked = self.links.stack(_filled(own, most, with_zeros=is_gradient))
        return _reshaped(stacked, [most * self.links.ways, *own.shape[1:]])

    def _summed(self, parts: Tensor, count: Any, most: Any) -> Tensor:
        received = self.links.swap(_reshaped(parts, [self.links.ways, most, *parts.shape[1:]]))
        # Half precision would round each of these sums.
        wide = tf.float64 if parts.dtype == tf.float64 else tf.float32
        return tf.cast(tf.reduce_sum(tf.cast(received, wide), 0), parts.dtype)[:count]

    def _rows_to_columns(self, rows: Tensor, axis: int) -> Tensor:
        received = self.links.swap(tf.stack(tf.split(rows, self.links.ways, axis)))
        return tf.concat(tf.unstack(received, self.links.ways), 0)

    def _columns_to_rows(self, columns: Tensor, axis: int, count: Any, most: Any) -> Tensor:
        ways = self.links.ways
        received = self.links.swap(_reshaped(columns, [ways, most, *columns.shape[1:]]))
        return tf.concat(tf.unstack(received, ways), axis)[:count]

    # --- numbers of rows ----------------------------------------------------------------------

    def _counts(self, rows: Tensor) -> tuple[Any, Any]:
        """Returns the numbers of rows of the replica's tensor, and of the largest one."""
        count = rows.shape[0]
        if count is not None:  # equal on all replicas
            return count, count
        count = tf.shape(rows)[0]
        if is_of_no_example(rows):  # it need not have the share's rows
            return count, tf.reduce_max(self.links.stack(count[None]))
        # A layer may have folded other axes into the first.
        return count, count // self.rows * self.most

    def _counts_of_team(self, tensor: Tensor) -> tuple[Any, Any]:
        most = tensor.shape[0]
        if most is not None:
            return most // self.links.ways, most // self.links.ways
        most = tf.shape(tensor)[0] // self.links.ways
        return most // self.most * self.rows, most


def team_of(links: Links, *tensors: Any) -> Team | None:
    """Returns the running replica's team, if a layer can compute in parts now.

    Args:
        links: Its collectives.
        *tensors: The layer's arguments.
    """
    batch = current_batch()
    if batch is None or not batch.is_traced or batch.is_updating or not batch.is_outermost:
        return None  # collectives in a branch or loop would wait for each other
    if _global_state.get_global_attribute("stateless_scope") is not None:
        return None  # `recompute` has gathered the weights
    if _global_state.get_global_attribute("symbolic_scope") is not None:
        return None
    if not all(isinstance(t, tf.Tensor) and t.shape.rank for t in tensors):
        return None
    if batch.team is None:
        rows = tf.maximum(tf.cast(batch.rows, tf.int64), 1)
        members = links.stack(tf.stack([rows, tf.cast(batch.offset, tf.int64)]))
        most = tf.cast(tf.reduce_max(members[:, 0]), tf.int32)
        first = tf.ensure_shape(members[:, 1], [links.ways])
        batch.team = Team(links, tf.cast(rows, tf.int32), most, first)
    team: Team = batch.team
    return team


@contextlib.contextmanager
def drawing_columns(team: Team, axis: int) -> Iterator[None]:
    """Makes a context in which dropout is that of the replica's columns.

    Args:
        team: The team.
        axis: The axis of the columns in what is dropped.
    """
    batch = current_batch()
    assert batch is not None
    before, batch.columns = batch.columns, Columns(team, axis)
    try:
        yield
    finally:
        batch.columns = before


def _filled(rows: Tensor, most: Any, with_zeros: bool = False) -> Tensor:
    """Fills rows up: with the last one, whose values are none that a layer does not know."""
    if rows.shape[0] is not None:
        return rows
    count = tf.shape(rows)[0]
    if with_zeros:
        return tf.pad(rows, [[0, most - count], *([[0, 0]] * (len(rows.shape) - 1))])
    return tf.gather(rows, tf.minimum(tf.range(most), count - 1))


def _reshaped(tensor: Tensor, shape: list[Any]) -> Tensor:
    """Reshapes to a shape, in which one size besides tensors may be None."""
    sizes = tf.shape(tensor)
    unknown = len(shape) - len(tensor.shape)
    dynamic = [
        sizes[axis - unknown] if size is None else size for axis, size in enumerate(shape)
    ]
    static = [size if isinstance(size, int) else None for size in shape]
    return tf.ensure_shape(tf.reshape(tensor, dynamic), static)
