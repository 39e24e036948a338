"""Arrays in memory: a sampler chooses the rows of each global batch by number."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import tensorflow as tf

from tfdist.data import leaves
from tfdist.data.epochs import START, DataPosition
from tfdist.data.source import (
    FEW,
    FOREVER,
    Share,
    Source,
    as_text,
    bounds,
    bounds_of_groups,
    no_groups,
    rows_per_replica,
    split_over_replicas,
    without_autograph,
    without_tuning,
)
from tfdist.samplers import Sampler, Sequential, Uniform
from tfdist.samplers.permutation import Rows
from tfdist.strategies.base import Place

Tensor = Any
_ROWS_AT_ONCE = 2**17  # with this many rows, a call of the sampler costs little: 1 MiB
_STEPS_AT_ONCE = 128


@dataclass
class Arrays(Source):
    """Arrays in memory, with rows chosen by a sampler.

    Attributes:
        data: Nested structure of tensors with equal first dimensions, as in `Share.data`.
        sampler: Chooses the rows of each step.
        batch_size: Examples of a full global batch.
        seed: The sampler's seed.
        batches: Steps of one pass over the rows, or None if the sampler has no passes.
        spans_passes: Whether the stream goes through all passes (training) or ends after one.
        requested_steps: The user's number of steps an epoch, or None.
        copies: How often each drawn row is repeated, one copy after the other.
        rows_multiple: The rows of a share are padded to a multiple of it, before they are
            copied. Rows beyond `Share.rows` do not count.
    """

    data: Any
    sampler: Sampler
    batch_size: int
    seed: int
    batches: int | None = field(kw_only=True)
    spans_passes: bool = field(kw_only=True)
    requested_steps: int | None = field(default=None, kw_only=True)
    copies: int = field(default=1, kw_only=True)
    rows_multiple: int = field(default=1, kw_only=True)

    _facts: ClassVar[int] = 1

    def __post_init__(self) -> None:
        self.may_be_empty = self.sampler.may_be_empty
        # An evaluation has a stream for each pass, always in the order of the first pass.
        self.is_same_each_pass = not self.spans_passes
        group_of = self.sampler.group_of
        self._group_of = None if group_of is None else tf.constant(group_of)

    @property
    def num_rows(self) -> int:
        """Examples."""
        return int(tf.nest.flatten(self.data)[0].shape[0])

    @property
    def num_local_rows(self) -> int:
        """Examples that this process has in `data`."""
        return self.num_rows

    def position_after(self, steps: int) -> DataPosition:
        """Returns the position of a new call of `fit`: after the rows of the last epoch."""
        if self.batches is None and self.requested_steps is not None:
            return DataPosition(
                num_drawn=-(-steps // self.requested_steps) * self.requested_steps
            )
        return super().position_after(steps)

    def shares(self, place: Place, position: DataPosition = START) -> Any:
        """Builds the stream of shares; each replica gathers only its own rows."""

        def share(rows: Tensor, facts: Tensor, replica: Tensor) -> Share:
            return self._share(place, rows, facts, replica)

        return without_tuning(split_over_replicas(self._row_numbers(position), share, place))

    def _share(self, place: Place, rows: Tensor, facts: Tensor, replica: Tensor) -> Share:
        """Gathers a replica's part of a batch from what `_draw` gave."""
        if place.num_replicas == 1 and not self.may_be_empty:
            all_rows = tf.slice(rows, tf.constant([0], tf.int64), facts)
            return Share(self._gather(leaves.with_num_rows(all_rows, self._full_batch)))
        total = facts[0]
        if self._group_of is None:
            begin, end = bounds(total, replica, place)
        else:
            groups = tf.gather(self._group_of, rows[:total])
            begin, end = bounds_of_groups(groups, replica, place)
        # A share without rows takes an arbitrary row as padding.
        first_row = tf.maximum(tf.minimum(begin, total - 1), 0)
        own_rows = rows[first_row : tf.maximum(end, first_row + 1)]
        if self._group_of is None:
            own_rows = leaves.with_num_rows(own_rows, rows_per_replica(self._full_batch, place))
        return self._gather_share(own_rows, end - begin, total, begin)

    @property
    def _full_batch(self) -> int | None:
        """Rows of every global batch if all are full, otherwise None.

        Some layers need a static batch size.
        """
        has_plain_order = isinstance(self.sampler, Sequential | Uniform) and self.copies == 1
        all_full = has_plain_order and self.num_rows % self.batch_size == 0
        return self.batch_size if all_full else None

    def _gather_share(
        self, rows: Tensor, count: Tensor, total: Tensor, offset: Tensor
    ) -> Share:
        """Gathers the rows of a share, with padding and copies."""
        copies = self.copies
        if self.rows_multiple > 1 and self._group_of is None:
            size = tf.size(rows)
            rounded = -(-size // self.rows_multiple) * self.rows_multiple
            # The last row fills up: any valid row does, because it does not count.
            rows = tf.gather(rows, tf.minimum(tf.range(rounded), size - 1))
        if copies > 1:
            rows = tf.repeat(rows, copies)
            count, total, offset = count * copies, total * copies, offset * copies
        group_of = self._group_of
        groups = no_groups() if group_of is None else tf.gather(group_of, rows)
        return Share(self._gather(rows), count, total, offset, tf.zeros([4]), groups)

    def sample(self, rows: int = FEW) -> Any:
        """Returns the first rows, at most a batch."""
        return self._gather(tf.range(min(rows, self.batch_size, self.num_local_rows)))

    @property
    def common_data(self) -> Any:
        """The arrays."""
        return self.data

    @property
    def columns(self) -> Any:
        """The arrays, or None if `tf.gather` cannot gather rows of all of them."""
        dense = all(leaves.is_dense(column) for column in tf.nest.flatten(self.data))
        return self.data if dense else None

    def row_numbers(self, position: DataPosition) -> Iterator[Rows]:
        """Yields global batches as row numbers, without end."""
        for first in itertools.count(self._first_step(position), self._at_once):
            yield from self._sample(first)

    def _gather(self, rows: Tensor) -> Any:
        return tf.nest.map_structure(lambda column: leaves.gather(column, rows), self.data)

    def _row_numbers(self, position: DataPosition) -> Any:
        """Builds a dataset of the row numbers, padded at the end, and the facts of `_draw`.

        The sampler draws many steps in one call, ahead of the steps that gather their rows.
        """
        at_once = self._at_once

        def draw_padded(first: np.int64) -> tuple[Any, Any]:
            batches, facts = self._draw(int(first))
            padded_rows = np.zeros((at_once, max(1, *map(len, batches))), np.int64)
            for row, batch in zip(padded_rows, batches, strict=True):
                row[: len(batch)] = batch
            return padded_rows, np.array(facts)

        @without_autograph
        def draw_tensors(first: Tensor) -> tuple[Tensor, Tensor]:
            rows, facts = tf.numpy_function(draw_padded, [first], (tf.int64, tf.int64))
            facts = tf.ensure_shape(facts, [at_once, self._facts])
            return tf.ensure_shape(rows, [at_once, None]), facts

        numbers = tf.data.Dataset.range(self._first_step(position), FOREVER, at_once)
        # One call at a time: `numpy_function` holds the interpreter's lock, so two gain
        # nothing.
        batches = numbers.map(draw_tensors, 1).prefetch(2).unbatch()
        if self.spans_passes:
            return batches
        return batches.take((self.batches or 0) - position.num_drawn)

    @property
    def _at_once(self) -> int:
        """Steps that the sampler draws in one call."""
        # In training, the steps of a short epoch are drawn together with the next ones.
        steps = self.steps or 1
        useful = max(steps, _STEPS_AT_ONCE) if self.spans_passes else steps
        return max(1, min(_ROWS_AT_ONCE // self.batch_size, useful))

    def _first_step(self, position: DataPosition) -> int:
        passes = position.number * (self.batches or 0) if self.spans_passes else 0
        return passes + position.num_drawn

    def _draw(self, first: int) -> tuple[list[Rows], list[list[int]]]:
        """Draws global batches; returns the rows and the facts (the size) for `_share`."""
        batches = self._sample(first)
        return batches, [[len(rows)] for rows in batches]

    def _sample(self, first: int) -> list[Rows]:
        settings = {"num_rows": self.num_rows, "batch_size": self.batch_size}
        return self.sampler.batches(first, self._at_once, seed=self.seed, **settings)

    def first_rows(self) -> bytes:
        """Returns the first rows that the sampler draws: they differ between samplers."""
        rows = self.sampler.rows(0, num_rows=self.num_rows, batch_size=64, seed=self.seed)
        return np.asarray(rows, np.int64).tobytes()

    def spec(self) -> Any:
        """Returns the shapes and dtypes of a batch."""
        rows = self._full_batch
        return tf.nest.map_structure(lambda column: leaves.spec(column, rows), self.data)

    def spec_text(self) -> str:
        """Returns the shapes and dtypes of a batch without its size, as text."""
        return as_text(tf.nest.map_structure(leaves.spec, self.data))

    def contents(self) -> bytes:
        """Returns the bytes of some rows of the arrays."""
        rows = np.unique(np.linspace(0, self.num_rows - 1, 64).astype(np.int64))
        columns = tf.nest.flatten(self.data)
        return b"".join(leaves.content(leaves.gather(column, rows)) for column in columns)

    def fingerprint(self) -> str:
        """Returns a text that differs if the arrays or the sampler differ."""
        digest = hashlib.sha256(self.contents())
        digest.update(self.first_rows())
        return f"{self.num_rows} rows of {super().fingerprint()}, {digest.hexdigest()[:12]}"
