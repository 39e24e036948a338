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
    dealt,
    no_groups,
    share_of,
    unconverted,
    untuned,
)
from tfdist.samplers import Sampler, Sequential, Uniform
from tfdist.samplers.permutation import Rows
from tfdist.strategies.base import Place

Tensor = Any
_ROWS_AT_ONCE = 2**17  # enough that calling the sampler costs little: 1 MiB of numbers
_STEPS_AT_ONCE = 128


@dataclass
class Arrays(Source):
    """Arrays in memory, rows chosen by a sampler.

    Attributes:
        data: Nested structure of tensors with equal first dimensions, as in `Share.data`.
        sampler: Chooses the rows of each step.
        batch_size: Examples of a full global batch.
        seed: The sampler's.
        batches: Steps of one pass over the rows, or None where the sampler has no passes.
        flows: Whether the stream goes through all passes (training) or ends after one.
        asked_steps: Steps an epoch, if the user has said.
        copies: How often each row that was drawn comes, one behind the other.
        rounded_to: Rows of a share are a multiple of it, those of one that was drawn less; what
            is beyond `Share.rows` does not count.
    """

    data: Any
    sampler: Sampler
    batch_size: int
    seed: int
    batches: int | None = field(kw_only=True)
    flows: bool = field(kw_only=True)
    asked_steps: int | None = field(default=None, kw_only=True)
    copies: int = field(default=1, kw_only=True)
    rounded_to: int = field(default=1, kw_only=True)

    _facts: ClassVar[int] = 1

    def __post_init__(self) -> None:
        self.may_be_empty = self.sampler.may_be_empty
        self.repeats = not self.flows  # then every pass has its rows in the same order
        of = self.sampler.group_of
        self._group_of = None if of is None else tf.constant(of)

    @property
    def num_rows(self) -> int:
        """Examples."""
        return int(tf.nest.flatten(self.data)[0].shape[0])

    @property
    def num_local_rows(self) -> int:
        """Examples that this process has in `data`."""
        return self.num_rows

    def position_after(self, steps: int) -> DataPosition:
        """Says where a new call of `fit` begins: rows go on after the last epoch's."""
        if self.batches is None and self.asked_steps is not None:
            return DataPosition(drawn=-(-steps // self.asked_steps) * self.asked_steps)
        return super().position_after(steps)

    def shares(self, place: Place, position: DataPosition = START) -> Any:
        """Builds the stream of shares; each gathers its own rows only."""

        def share(rows: Tensor, facts: Tensor, replica: Tensor) -> Share:
            return self._share(place, rows, facts, replica)

        return untuned(dealt(self._row_numbers(position), share, place))

    def _share(self, place: Place, rows: Tensor, facts: Tensor, replica: Tensor) -> Share:
        """Gathers a replica's part of a batch from what `_drawn` gave."""
        if place.num_replicas == 1 and not self.may_be_empty:
            all_rows = tf.slice(rows, tf.constant([0], tf.int64), facts)
            return Share(self._gather(leaves.sized(all_rows, self._full_batch)))
        total = facts[0]
        if self._group_of is None:
            begin, end = bounds(total, replica, place)
        else:
            groups = tf.gather(self._group_of, rows[:total])
            begin, end = bounds_of_groups(groups, replica, place)
        padded = tf.maximum(tf.minimum(begin, total - 1), 0)
        mine = rows[padded : tf.maximum(end, padded + 1)]
        if self._group_of is None:
            mine = leaves.sized(mine, share_of(self._full_batch, place))
        return self._dealt(mine, end - begin, total, begin)

    @property
    def _full_batch(self) -> int | None:
        """Rows of every global batch, where all have equally many: some layers must know."""
        in_turn = isinstance(self.sampler, Sequential | Uniform) and self.copies == 1
        return self.batch_size if in_turn and self.num_rows % self.batch_size == 0 else None

    def _dealt(self, rows: Tensor, count: Tensor, total: Tensor, offset: Tensor) -> Share:
        """Gathers the rows of a share, each as often as it is to come."""
        copies = self.copies
        if self.rounded_to > 1 and self._group_of is None:
            size = tf.size(rows)
            rounded = -(-size // self.rounded_to) * self.rounded_to
            rows = tf.gather(rows, tf.minimum(tf.range(rounded), size - 1))
        if copies > 1:
            rows = tf.repeat(rows, copies)
            count, total, offset = count * copies, total * copies, offset * copies
        of = self._group_of
        groups = no_groups() if of is None else tf.gather(of, rows)
        return Share(self._gather(rows), count, total, offset, tf.zeros([4]), groups)

    def sample(self, rows: int = FEW) -> Any:
        """Gives the first rows, at most a batch."""
        return self._gather(tf.range(min(rows, self.batch_size, self.num_local_rows)))

    @property
    def held(self) -> Any:
        """The arrays."""
        return self.data

    @property
    def columns(self) -> Any:
        """The arrays, or None where rows of some cannot be gathered by `tf.gather`."""
        dense = all(leaves.is_dense(column) for column in tf.nest.flatten(self.data))
        return self.data if dense else None

    def row_numbers(self, position: DataPosition) -> Iterator[Rows]:
        """Gives global batches as row numbers, without end."""
        for first in itertools.count(self._first_step(position), self._at_once):
            yield from self._sampled(first)

    def _gather(self, rows: Tensor) -> Any:
        return tf.nest.map_structure(lambda column: leaves.gather(column, rows), self.data)

    def _row_numbers(self, position: DataPosition) -> Any:
        """Builds a dataset of row numbers, padded at the end, and facts, both of `_drawn`.

        The sampler is asked for many steps at once, ahead of those that gather their rows.
        """
        at_once = self._at_once

        def draw(first: np.int64) -> tuple[Any, Any]:
            batches, facts = self._drawn(int(first))
            padded = np.zeros((at_once, max(1, *map(len, batches))), np.int64)
            for row, batch in zip(padded, batches, strict=True):
                row[: len(batch)] = batch
            return padded, np.array(facts)

        @unconverted
        def drawn(first: Tensor) -> tuple[Tensor, Tensor]:
            rows, facts = tf.numpy_function(draw, [first], (tf.int64, tf.int64))
            facts = tf.ensure_shape(facts, [at_once, self._facts])
            return tf.ensure_shape(rows, [at_once, None]), facts

        numbers = tf.data.Dataset.range(self._first_step(position), FOREVER, at_once)
        batches = numbers.map(drawn, 1).prefetch(2).unbatch()
        return batches if self.flows else batches.take((self.batches or 0) - position.drawn)

    @property
    def _at_once(self) -> int:
        """Steps of which the sampler is asked in one call."""
        # A short epoch's steps are drawn with those of the next ones, if there are any.
        steps = self.steps or 1
        useful = max(steps, _STEPS_AT_ONCE) if self.flows else steps
        return max(1, min(_ROWS_AT_ONCE // self.batch_size, useful))

    def _first_step(self, position: DataPosition) -> int:
        passes = position.number * (self.batches or 0) if self.flows else 0
        return passes + position.drawn

    def _drawn(self, first: int) -> tuple[list[Rows], list[list[int]]]:
        """Draws global batches, and tells what `_share` must know of each: its size."""
        batches = self._sampled(first)
        return batches, [[len(rows)] for rows in batches]

    def _sampled(self, first: int) -> list[Rows]:
        settings = {"num_rows": self.num_rows, "batch_size": self.batch_size}
        return self.sampler.batches(first, self._at_once, seed=self.seed, **settings)

    def first_rows(self) -> bytes:
        """Gives what the sampler draws first, of any batch size: it tells orders apart."""
        drawn = self.sampler.rows(0, num_rows=self.num_rows, batch_size=64, seed=self.seed)
        return np.asarray(drawn, np.int64).tobytes()

    def spec(self) -> Any:
        """Gives the shapes and dtypes of a batch."""
        rows = self._full_batch
        return tf.nest.map_structure(lambda column: leaves.spec(column, rows), self.data)

    def spec_text(self) -> str:
        """Writes down what of a batch does not depend on its size."""
        return as_text(tf.nest.map_structure(leaves.spec, self.data))

    def contents(self) -> bytes:
        """Gives some rows of the arrays."""
        rows = np.unique(np.linspace(0, self.num_rows - 1, 64).astype(np.int64))
        columns = tf.nest.flatten(self.data)
        return b"".join(leaves.content(leaves.gather(column, rows)) for column in columns)

    def fingerprint(self) -> str:
        """Sums up number, shape and some rows of the arrays, and a step of the sampler."""
        digest = hashlib.sha256(self.contents())
        digest.update(self.first_rows())
        return f"{self.num_rows} rows of {super().fingerprint()}, {digest.hexdigest()[:12]}"
