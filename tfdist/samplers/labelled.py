"""What samplers that draw by class have in common."""

from __future__ import annotations

import abc
import functools
from typing import Any

import numpy as np

from tfdist.errors import ArgumentError
from tfdist.samplers.base import Sampler
from tfdist.samplers.classes import Classes
from tfdist.samplers.permutation import DRAWN_UP_TO, Rows, generator, permute

# The second number of every key, so that no two draws share one.
OF_CLASS, OF_BLOCK, OF_EPOCH, OF_PLACES = range(1, 5)


class Labelled(Sampler):
    """A sampler that needs each row's class: from `labels`, or from `y` when bound.

    Attributes:
        labels: Classes of the rows, or None.
    """

    labels: Any

    @abc.abstractmethod
    def drawing(self, labels: Any, name: str) -> Drawing:
        """Makes the sampler that draws from rows with these labels.

        Args:
            labels: As in `classes.group_rows`.
            name: What to call them in messages.
        """

    def bind(self, targets: Any, num_rows: int) -> Sampler:
        """Gives the sampler that draws from particular data; see `Sampler.bind`."""
        if self.labels is None and targets is None:
            raise ArgumentError(
                f"`{type(self).__name__}` must know the rows' classes. Received: neither y nor "
                "labels. Pass them: labels=..."
            )
        drawing = self.drawing(targets, "y") if self.labels is None else self._of_labels
        drawing.check_rows(num_rows)
        return drawing

    @functools.cached_property
    def _of_labels(self) -> Drawing:
        if self.labels is None:
            raise ArgumentError(
                f"`{type(self).__name__}` must know the rows' classes. Received: labels=None. "
                "Pass them: labels=..., or let `fit` take them from y."
            )
        return self.drawing(self.labels, "labels")

    def steps_per_epoch(self, num_rows: int, batch_size: int) -> int:
        """Says how many steps make an epoch; see `Sampler.steps_per_epoch`."""
        return self._of_labels.steps_per_epoch(num_rows, batch_size)

    def rows(self, step: int, *, num_rows: int, batch_size: int, seed: int) -> Rows:
        """Gives the rows of one global batch; see `Sampler.rows`."""
        return self._of_labels.rows(step, num_rows=num_rows, batch_size=batch_size, seed=seed)

    def batches(
        self, first: int, count: int, *, num_rows: int, batch_size: int, seed: int
    ) -> list[Rows]:
        """Gives the rows of several steps; see `Sampler.batches`."""
        return self._of_labels.batches(
            first, count, num_rows=num_rows, batch_size=batch_size, seed=seed
        )


class Drawing(Sampler):
    """A sampler bound to its data, drawing an epoch's stretch at a time.

    Attributes:
        num_rows: Rows of the data.
        drawn: Rows drawn in an epoch.
    """

    num_rows: int
    drawn: int

    @abc.abstractmethod
    def stretch(self, epoch: int, start: int, stop: int, batch_size: int, seed: int) -> Rows:
        """Gives the rows of adjacent steps, one after the other.

        Args:
            epoch: Epochs before.
            start: The first step of the epoch.
            stop: The step after the last.
            batch_size: As in `rows`.
            seed: As in `rows`.
        """

    def between(self, begin: int, end: int, seed: int) -> Rows:
        """Gives the draws from one to before another, counted through all epochs.

        Args:
            begin: The first, of range(drawn) in the first epoch.
            end: The one after the last, above `begin`.
            seed: As in `rows`.
        """
        parts = []
        for epoch in range(begin // self.drawn, -(-end // self.drawn)):
            before = epoch * self.drawn
            start, stop = max(begin - before, 0), min(end - before, self.drawn)
            parts.append(self.stretch(epoch, start, stop, 1, seed))
        return np.concatenate(parts)

    def check_rows(self, num_rows: int) -> None:
        """Refuses data of another length.

        Args:
            num_rows: Rows of the data.

        Raises:
            ArgumentError: There are not as many rows as the sampler was made for.
        """
        if num_rows != self.num_rows:
            raise ArgumentError(
                "A sampler must have one label or weight for each row. Received: "
                f"{self.num_rows} labels or weights, and data with {num_rows} rows. With "
                "validation_split, split the data beforehand and pass validation_data."
            )

    def steps_per_epoch(self, num_rows: int, batch_size: int) -> int:
        """Says how many steps make an epoch; see `Sampler.steps_per_epoch`."""
        return -(-self.drawn // batch_size)

    def rows(self, step: int, *, num_rows: int, batch_size: int, seed: int) -> Rows:
        """Gives the rows of one global batch; see `Sampler.rows`."""
        return self.batches(step, 1, num_rows=num_rows, batch_size=batch_size, seed=seed)[0]

    def batches(
        self, first: int, count: int, *, num_rows: int, batch_size: int, seed: int
    ) -> list[Rows]:
        """Gives the rows of several steps; see `Sampler.batches`."""
        self.check_rows(num_rows)
        steps = self.steps_per_epoch(num_rows, batch_size)
        found: list[Rows] = []
        while len(found) < count:
            epoch, start = divmod(first + len(found), steps)
            stop = min(steps, start + count - len(found))
            rows = self.stretch(epoch, start, stop, batch_size, seed)
            found += np.split(rows, range(batch_size, len(rows), batch_size))
        return found


class Passes:
    """Each class's rows, in a random order, then in another one, and so on without end.

    The n-th occurrence of a class is a function of the seed and n. No row comes again
    before all others of its class have.

    Args:
        classes: The rows of each class.
        quotas: Occurrences of each class in an epoch.
    """

    _AT_ONCE = 4096
    _AHEAD = 2**14

    def __init__(self, classes: Classes, quotas: Rows) -> None:
        self._classes = classes
        # Of a class with few rows, many passes are drawn together, but no more than needed.
        together = np.maximum(1, np.minimum(self._AT_ONCE, quotas) // classes.counts)
        self._periods = classes.counts * together
        self._held: dict[int, tuple[tuple[int, ...], Any]] = {}

    def rows(self, seed: int, number: int, occurrences: Rows) -> Rows:
        """Gives rows of one class.

        Args:
            seed: Chooses the orders.
            number: The class.
            occurrences: int64 array, at least one; in ascending order, unless all are of
                one pass.
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
        """Gives the rows of adjacent occurrences of a class.

        Args:
            seed: Chooses the orders.
            number: The class.
            first: The first occurrence.
            count: How many, at least one.
        """
        period, size = int(self._periods[number]), int(self._classes.counts[number])
        parts = []
        while count:
            drawn, start = divmod(first, period)
            taken = min(count, period - start)
            if size <= DRAWN_UP_TO:
                order = self._drawn_order(seed, number, drawn)
            elif taken >= self._AHEAD:
                order = permute(
                    np.arange(start, start + taken), size, (seed, OF_CLASS, number, drawn)
                )
                start = 0
            else:
                order, begin = self._ahead(seed, number, drawn, start)
                start -= begin
                taken = min(taken, len(order) - start)
            parts.append(order[start : start + taken])
            first, count = first + taken, count - taken
        places = (parts[0] if len(parts) == 1 else np.concatenate(parts)).astype(np.int64)
        rows: Rows = self._classes.members[places + self._classes.offsets[number]]
        return rows

    def _permuted(self, seed: int, number: int, drawn: int, positions: Rows) -> Rows:
        size = int(self._classes.counts[number])
        key = (seed, OF_CLASS, number, drawn)
        if size > DRAWN_UP_TO:
            return permute(positions, size, key)
        places: Rows = self._drawn_order(seed, number, drawn)[positions].astype(np.int64)
        return places

    def _ahead(self, seed: int, number: int, drawn: int, start: int) -> tuple[Any, int]:
        """Gives a piece of a large class's order, and where it begins."""
        begin = start // self._AHEAD * self._AHEAD
        key = (seed, OF_CLASS, number, drawn, begin)
        held = self._held.get(number)
        if held is None or held[0] != key:
            size = int(self._classes.counts[number])
            positions = np.arange(begin, min(begin + self._AHEAD, size))
            held = (key, permute(positions, size, key[:-1]).astype(np.min_scalar_type(size)))
            self._held[number] = held  # one assignment: threads may draw at once
        return held[1], begin

    def _drawn_order(self, seed: int, number: int, drawn: int) -> Any:
        """Gives the order of a small class, as often as its period has it."""
        key = (seed, OF_CLASS, number, drawn)
        held = self._held.get(number)
        if held is None or held[0] != key:
            size = int(self._classes.counts[number])
            together = int(self._periods[number]) // size
            source = generator(key)
            order = (
                source.permutation(size)
                if together == 1
                else source.random_sample((together, size)).argsort(1, kind="stable").ravel()
            )
            held = (key, order.astype(np.uint16))
            self._held[number] = held  # one assignment: threads may draw at once
        return held[1]
