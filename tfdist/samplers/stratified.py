"""Every global batch with the class shares of the whole data."""

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
    Drawing,
    Labelled,
    Passes,
)
from tfdist.samplers.permutation import Rows, generator, permute


@dataclass(frozen=True, eq=False)
class Stratified(Labelled):
    """Draws every row once an epoch; each batch keeps the class shares of the data.

    A batch of b rows holds of a class with share p as nearly p*b rows as whole numbers allow:
    that number, rounded up or down. With multi-label targets each combination of labels that
    occurs is a class.

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

    def drawing(self, labels: Any, name: str) -> Drawing:
        """Makes the sampler that draws from rows with these labels."""
        return _Strata(group_rows(labels, name, combinations=True))


class _Strata(Drawing):
    """Deals the rows, sorted by class, out to the batches in turn.

    A class's rows are adjacent, so a batch gets of them what it should, rounded up or down.
    If the last batch is smaller, its rows are taken out beforehand, at equal distances
    (systematic sampling; Cochran, "Sampling Techniques", 1977, chapter 8).

    Args:
        classes: The rows of each class.
    """

    def __init__(self, classes: Classes) -> None:
        self.num_rows = self.drawn = classes.num_rows
        self._counts = classes.counts
        self._passes = Passes(classes, classes.counts)
        self._plan = functools.lru_cache(maxsize=2)(self._draw_plan)

    def stretch(self, epoch: int, start: int, stop: int, batch_size: int, seed: int) -> Rows:
        """Gives the rows of adjacent steps; see `Drawing.stretch`."""
        full = self.num_rows // batch_size
        dealt, turns, places = self._plan(seed, epoch, batch_size)
        edges = np.concatenate([[0], np.cumsum(dealt)])
        steps = np.arange(start, min(stop, full))
        slots = turns[steps][:, None] + np.arange(batch_size) * full
        # Places differ from step to step, so that no replica gets the same classes always.
        slots = np.take_along_axis(slots, (places + steps[:, None]) % batch_size, 1).ravel()
        numbers = np.searchsorted(edges, slots, "right") - 1
        occurrences = slots - edges[numbers]
        if stop > full:
            last = self._counts - dealt
            mixed = generator((seed, OF_BLOCK, epoch)).permutation(int(last.sum()))
            rest = np.repeat(np.arange(len(last)), last)
            left = np.arange(len(rest)) - np.repeat(np.cumsum(last) - last, last)
            numbers = np.concatenate([numbers, rest[mixed]])
            occurrences = np.concatenate([occurrences, (left + dealt[rest])[mixed]])
        return self._rows(seed, epoch, numbers, occurrences)

    def _draw_plan(self, seed: int, epoch: int, batch_size: int) -> tuple[Rows, Rows, Rows]:
        """Gives classes' rows in full batches, the batches' turns, and places in one."""
        full, rest = divmod(self.num_rows, batch_size)
        last = np.zeros_like(self._counts)
        if rest:
            offset = generator((seed, OF_EPOCH, epoch)).randint(self.num_rows)
            taken = (np.arange(rest) * self.num_rows + offset) // rest
            numbers = np.searchsorted(np.cumsum(self._counts), taken, "right")
            last = np.bincount(numbers, minlength=len(last))
        turns = permute(np.arange(full), full, (seed, OF_EPOCH, epoch)) if full else last[:0]
        places = generator((seed, OF_PLACES, epoch)).permutation(batch_size)
        return self._counts - last, turns, places

    def _rows(self, seed: int, epoch: int, numbers: Rows, occurrences: Rows) -> Rows:
        """Finds the rows of classes' occurrences in an epoch."""
        numbers = numbers.astype(np.min_scalar_type(len(self._counts)))
        order = np.argsort(numbers, kind="stable")
        counts = np.bincount(numbers, minlength=len(self._counts))
        stops = np.cumsum(counts)
        rows = np.empty(len(numbers), np.int64)
        for c in np.flatnonzero(counts):
            mine = order[stops[c] - counts[c] : stops[c]]
            rows[mine] = self._passes.rows(
                seed, int(c), occurrences[mine] + epoch * self._counts[c]
            )
        return rows
