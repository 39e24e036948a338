"""The common parts of samplers that draw by class."""

from __future__ import annotations

import abc
import functools
from typing import Any

import numpy as np

from tfdist.errors import ArgumentError
from tfdist.samplers.base import Sampler
from tfdist.samplers.classes import Classes
from tfdist.samplers.permutation import DRAWN_UP_TO, Rows, generator, permute

# The second number of every random key, so that no two kinds of draws use the same key.
OF_CLASS, OF_BLOCK, OF_EPOCH, OF_PLACES = range(1, 5)


class Labelled(Sampler):
    """A sampler that needs the class of each row, from `labels` or from `y` of `fit`.

    Attributes:
        labels: Classes of the rows; None to take them from `y`.
    """

    labels: Any

    @abc.abstractmethod
    def drawing(self, labels: Any, name: str) -> BoundSampler:
        """Makes the sampler that draws from rows with these labels.

        Args:
            labels: As in `classes.group_rows`.
            name: The argument's name, for messages.
        """

    def bind(self, targets: Any, num_rows: int) -> Sampler:
        """Returns the sampler for particular data; see `Sampler.bind`."""
        if self.labels is None and targets is None:
            raise ArgumentError(
                f"`{type(self).__name__}` must know the rows' classes. Received: neither y nor "
                "labels. Pass them: labels=..."
            )
        drawing = self.drawing(targets, "y") if self.labels is None else self._of_labels
        drawing.check_rows(num_rows)
        return drawing

    @functools.cached_property
    def _of_labels(self) -> BoundSampler:
        if self.labels is None:
            raise ArgumentError(
                f"`{type(self).__name__}` must know the rows' classes. Received: labels=None. "
                "Pass them: labels=..., or let `fit` take them from y."
            )
        return self.drawing(self.labels, "labels")

    def steps_per_epoch(self, num_rows: int, batch_size: int) -> int:
        """Returns the steps of an epoch; see `Sampler.steps_per_epoch`."""
        return self._of_labels.steps_per_epoch(num_rows, batch_size)

    def rows(self, step: int, *, num_rows: int, batch_size: int, seed: int) -> Rows:
        """Returns the rows of one global batch; see `Sampler.rows`."""
        return self._of_labels.rows(step, num_rows=num_rows, batch_size=batch_size, seed=seed)

    def batches(
        self, first: int, count: int, *, num_rows: int, batch_size: int, seed: int
    ) -> list[Rows]:
        """Returns the rows of several steps; see `Sampler.batches`."""
        return self._of_labels.batches(
            first, count, num_rows=num_rows, batch_size=batch_size, seed=seed
        )


class BoundSampler(Sampler):
    """A sampler that is bound to its data, and draws adjacent steps of an epoch in one call.

    Attributes:
        num_rows: Rows of the data.
        draws_per_epoch: Rows drawn in an epoch.
    """

    num_rows: int
    draws_per_epoch: int

    @abc.abstractmethod
    def stretch(self, epoch: int, start: int, stop: int, batch_size: int, seed: int) -> Rows:
        """Returns the rows of adjacent steps, one after the other.

        Args:
            epoch: The number of the epoch, from 0.
            start: The first step, counted in the epoch.
            stop: The step after the last one.
            batch_size: As in `rows`.
            seed: As in `rows`.
        """

    def between(self, begin: int, end: int, seed: int) -> Rows:
        """Returns the draws from `begin` to before `end`, counted through all epochs.

        Args:
            begin: The first draw; the first epoch has the draws of range(draws_per_epoch).
            end: The draw after the last one, above `begin`.
            seed: As in `rows`.
        """
        parts = []
        for epoch in range(begin // self.draws_per_epoch, -(-end // self.draws_per_epoch)):
            before = epoch * self.draws_per_epoch
            start, stop = max(begin - before, 0), min(end - before, self.draws_per_epoch)
            parts.append(self.stretch(epoch, start, stop, 1, seed))
        return np.concatenate(parts)

    def check_rows(self, num_rows: int) -> None:
        """Refuses data with another number of rows.

        Args:
            num_rows: Rows of the data.

        Raises:
            ArgumentError: The sampler was made for another number of rows.
        """
        if num_rows != self.num_rows:
            raise ArgumentError(
                "A sampler must have one label or weight for each row. Received: "
                f"{self.num_rows} labels or weights, and data with {num_rows} rows. With "
                "validation_split, split the data beforehand and pass validation_data."
            )

    def steps_per_epoch(self, num_rows: int, batch_size: int) -> int:
        """Returns the steps of an epoch; see `Sampler.steps_per_epoch`."""
        return -(-self.draws_per_epoch // batch_size)

    def rows(self, step: int, *, num_rows: int, batch_size: int, seed: int) -> Rows:
        """Returns the rows of one global batch; see `Sampler.rows`."""
        return self.batches(step, 1, num_rows=num_rows, batch_size=batch_size, seed=seed)[0]

    def batches(
        self, first: int, count: int, *, num_rows: int, batch_size: int, seed: int
    ) -> list[Rows]:
        """Returns the rows of several steps; see `Sampler.batches`."""
        self.check_rows(num_rows)
        steps = self.steps_per_epoch(num_rows, batch_size)
        batches: list[Rows] = []
        while len(batches) < count:
            epoch, start = divmod(first + len(batches), steps)
            stop = min(steps, start + count - len(batches))
            rows = self.stretch(epoch, start, stop, batch_size, seed)
            batches += np.split(rows, range(batch_size, len(rows), batch_size))
        return batches


class Passes:
    """Endless passes over each class's rows, each pass in its own random order.

    The n-th occurrence of a class is a function of the seed and n. No row comes a second time
    before all other rows of its class have come.

    Args:
        classes: The rows of each class.
        quotas: Occurrences of each class in an epoch.
    """

    _AT_ONCE = 4096
    _PIECE = 2**14

    def __init__(self, classes: Classes, quotas: Rows) -> None:
        self._classes = classes
        # For a class with few rows, several passes are drawn in one call.
        passes_at_once = np.maximum(1, np.minimum(self._AT_ONCE, quotas) // classes.counts)
        self._periods = classes.counts * passes_at_once
        self._cached_orders: dict[int, tuple[tuple[int, ...], Any]] = {}

    def rows(self, seed: int, number: int, occurrences: Rows) -> Rows:
        """Returns rows of one class.

        Args:
            seed: Chooses the orders.
            number: The class.
            occurrences: int64 array with at least one value, in ascending order. The order is
                free if all values are in one pass.
        """
        period = int(self._periods[number])
        first, last = int(occurrences[0]) // period, int(occurrences[-1]) // period
        edges = np.searchsorted(occurrences, np.arange(first + 1, last + 1) * period)
        inside = [
            self._permuted(seed, number, first + i, part - (first + i) * period)
            for i, part in enumerate(
                np.split(occurrences, edges) if last > first else [occurrences]
            )
        ]
        places = np.concatenate(inside) if last > first else inside[0]
        rows: Rows = self._classes.members[places + self._classes.offsets[number]]
        return rows

    def stretch(self, seed: int, number: int, first: int, count: int) -> Rows:
        """Returns the rows of adjacent occurrences of a class.

        Args:
            seed: Chooses the orders.
            number: The class.
            first: The first occurrence.
            count: How many, at least one.
        """
        period, size = int(self._periods[number]), int(self._classes.counts[number])
        parts = []
        while count:
            period_number, start = divmod(first, period)
            num_taken = min(count, period - start)
            if size <= DRAWN_UP_TO:
                order = self._small_order(seed, number, period_number)
            elif num_taken >= self._PIECE:
                order = permute(
                    np.arange(start, start + num_taken),
                    size,
                    (seed, OF_CLASS, number, period_number),
                )
                start = 0
            else:
                order, begin = self._piece_of_order(seed, number, period_number, start)
                start -= begin
                num_taken = min(num_taken, len(order) - start)
            parts.append(order[start : start + num_taken])
            first, count = first + num_taken, count - num_taken
        places = (parts[0] if len(parts) == 1 else np.concatenate(parts)).astype(np.int64)
        rows: Rows = self._classes.members[places + self._classes.offsets[number]]
        return rows

    def _permuted(self, seed: int, number: int, period_number: int, positions: Rows) -> Rows:
        size = int(self._classes.counts[number])
        key = (seed, OF_CLASS, number, period_number)
        if size > DRAWN_UP_TO:
            return permute(positions, size, key)
        places: Rows = self._small_order(seed, number, period_number)[positions].astype(
            np.int64
        )
        return places

    def _piece_of_order(
        self, seed: int, number: int, period_number: int, start: int
    ) -> tuple[Any, int]:
        """Returns a piece of a large class's order, and where the piece begins."""
        begin = start // self._PIECE * self._PIECE
        key = (seed, OF_CLASS, number, period_number, begin)
        cached = self._cached_orders.get(number)
        if cached is None or cached[0] != key:
            size = int(self._classes.counts[number])
            positions = np.arange(begin, min(begin + self._PIECE, size))
            cached = (key, permute(positions, size, key[:-1]).astype(np.min_scalar_type(size)))
            self._cached_orders[number] = cached  # one assignment: threads may draw at once
        return cached[1], begin

    def _small_order(self, seed: int, number: int, period_number: int) -> Any:
        """Returns the orders of a small class in one period, one after the other."""
        key = (seed, OF_CLASS, number, period_number)
        cached = self._cached_orders.get(number)
        if cached is None or cached[0] != key:
            size = int(self._classes.counts[number])
            passes_at_once = int(self._periods[number]) // size
            source = generator(key)
            order = (
                source.permutation(size)
                if passes_at_once == 1
                else source.random_sample((passes_at_once, size))
                .argsort(1, kind="stable")
                .ravel()
            )
            cached = (key, order.astype(np.uint16))
            self._cached_orders[number] = cached  # one assignment: threads may draw at once
        return cached[1]
