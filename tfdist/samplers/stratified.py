"""A sampler whose global batches have the class shares of the whole data."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfdist.samplers.classes import Classes, group_rows
from tfdist.samplers.labelled import (
    OF_BLOCK,
    OF_EPOCH,
    OF_PLACES,
    BoundSampler,
    Labelled,
    Passes,
)
from tfdist.samplers.permutation import Rows, generator, permute


@dataclass(frozen=True, eq=False)
class Stratified(Labelled):
    """Draws every row once an epoch; each batch keeps the class shares of the data.

    A batch of b rows has p*b rows of a class with share p, rounded up or down. With
    multi-label targets, each combination of labels that occurs is a class.

    Args:
        labels: As in `ClassBalanced`.

    Example:
        >>> import numpy as np
        >>> from tfdist.samplers import Stratified
        >>> labels = np.array([0] * 75 + [1] * 25)
        >>> sampler = Stratified(labels)
        >>> rows = sampler.rows(0, num_rows=100, batch_size=20, seed=1)
        >>> np.bincount(labels[rows]).tolist()
        [15, 5]
    """

    labels: Any = None

    def drawing(self, labels: Any, name: str) -> BoundSampler:
        """Makes the sampler that draws from rows with these labels."""
        return _Strata(group_rows(labels, name, combinations=True))


class _Strata(BoundSampler):
    """Sorts the rows by class, and distributes them over the batches in turn.

    The rows of a class are adjacent, so each batch gets its share of them, rounded up or down.
    If the last batch is smaller, its rows are selected first, at equal distances (systematic
    sampling; Cochran, "Sampling Techniques", 1977, chapter 8).

    Args:
        classes: The rows of each class.
    """

    def __init__(self, classes: Classes) -> None:
        self.num_rows = self.draws_per_epoch = classes.num_rows
        self._counts = classes.counts
        self._passes = Passes(classes, classes.counts)
        self._plan = functools.lru_cache(maxsize=2)(self._draw_plan)

    def stretch(self, epoch: int, start: int, stop: int, batch_size: int, seed: int) -> Rows:
        """Returns the rows of adjacent steps; see `BoundSampler.stretch`."""
        full = self.num_rows // batch_size
        in_full_batches, turns, places = self._plan(seed, epoch, batch_size)
        edges = np.concatenate([[0], np.cumsum(in_full_batches)])
        steps = np.arange(start, min(stop, full))
        # Row i, in the order of classes, belongs to the full batch whose turn is i % full.
        slots = turns[steps][:, None] + np.arange(batch_size) * full
        # Positions in the batch change with the step: no replica always gets the same classes.
        slots = np.take_along_axis(slots, (places + steps[:, None]) % batch_size, 1).ravel()
        numbers = np.searchsorted(edges, slots, "right") - 1
        occurrences = slots - edges[numbers]
        if stop > full:
            in_last_batch = self._counts - in_full_batches
            mixed = generator((seed, OF_BLOCK, epoch)).permutation(int(in_last_batch.sum()))
            rest = np.repeat(np.arange(len(in_last_batch)), in_last_batch)
            places_in_class = np.arange(len(rest)) - np.repeat(
                np.cumsum(in_last_batch) - in_last_batch, in_last_batch
            )
            numbers = np.concatenate([numbers, rest[mixed]])
            occurrences = np.concatenate(
                [occurrences, (places_in_class + in_full_batches[rest])[mixed]]
            )
        return self._rows(seed, epoch, numbers, occurrences)

    def _draw_plan(self, seed: int, epoch: int, batch_size: int) -> tuple[Rows, Rows, Rows]:
        """Returns each class's rows in full batches, the batches' order, and positions."""
        full, rest = divmod(self.num_rows, batch_size)
        in_last_batch = np.zeros_like(self._counts)
        if rest:
            offset = generator((seed, OF_EPOCH, epoch)).randint(self.num_rows)
            selected_rows = (np.arange(rest) * self.num_rows + offset) // rest
            numbers = np.searchsorted(np.cumsum(self._counts), selected_rows, "right")
            in_last_batch = np.bincount(numbers, minlength=len(in_last_batch))
        turns = (
            permute(np.arange(full), full, (seed, OF_EPOCH, epoch))
            if full
            else in_last_batch[:0]
        )
        places = generator((seed, OF_PLACES, epoch)).permutation(batch_size)
        return self._counts - in_last_batch, turns, places

    def _rows(self, seed: int, epoch: int, numbers: Rows, occurrences: Rows) -> Rows:
        """Returns the rows for occurrences of classes in an epoch."""
        numbers = numbers.astype(np.min_scalar_type(len(self._counts)))
        order = np.argsort(numbers, kind="stable")
        counts = np.bincount(numbers, minlength=len(self._counts))
        stops = np.cumsum(counts)
        rows = np.empty(len(numbers), np.int64)
        for c in np.flatnonzero(counts):
            of_class = order[stops[c] - counts[c] : stops[c]]
            rows[of_class] = self._passes.rows(
                seed, int(c), occurrences[of_class] + epoch * self._counts[c]
            )
        return rows
