"""Samplers that set how often each class comes."""

from __future__ import annotations

import abc
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfdist.errors import ArgumentError
from tfdist.samplers.classes import Classes, group_rows
from tfdist.samplers.labelled import OF_BLOCK, OF_EPOCH, Drawing, Labelled, Passes
from tfdist.samplers.permutation import Rows, generator, permute

_BLOCK = 2**16


class ByQuota(Labelled):
    """Draws a fixed number of rows of each class an epoch."""

    @abc.abstractmethod
    def quotas(self, classes: Classes) -> Rows:
        """Says how many rows of each class are drawn in an epoch."""

    def drawing(self, labels: Any, name: str) -> Quotas:
        """Makes the sampler that draws from rows with these labels."""
        classes = group_rows(labels, name)
        return Quotas(classes, self.quotas(classes))

    def of_classes(self, counts: Rows) -> Quotas:
        """Makes the sampler that draws class numbers in place of rows.

        Args:
            counts: int64 array, rows of each class, at least 1.
        """
        numbers = np.arange(len(counts))
        total = int(counts.sum())
        quotas = self.quotas(Classes(numbers.tolist(), counts, numbers, numbers, total))
        alone = Classes(numbers.tolist(), np.ones_like(numbers), numbers, numbers, len(numbers))
        return Quotas(alone, quotas)


@dataclass(frozen=True, eq=False)
class ClassBalanced(ByQuota):
    """Draws class c with a probability proportional to n_c^(1-alpha), n_c being its rows.

    0 leaves the shares as they are, 1 makes them equal, 1/2 is square-root sampling (Kang
    et al., "Decoupling representation and classifier for long-tailed recognition", ICLR
    2020, section 3, where q = 1 - alpha). An epoch is as many draws as the data has rows,
    so many of each class as its share gives, rounded, in random order. Within a class no row
    comes again before all others have, also from one epoch to the next.

    With multi-label targets a class is drawn, then a row that has it among its labels
    (class-aware sampling; Shen et al., "Relay backpropagation", ECCV 2016, section 3.2). Rows
    without any label are one more class.

    Args:
        alpha: From 0 to 1.
        labels: Each row's class, array of shape [rows], or [rows, classes] of zeros and
            ones; `y` of `fit` if None.

    Raises:
        ArgumentError: `alpha` is not from 0 to 1, or the labels are not classes.

    Example:
        >>> import numpy as np
        >>> from tfdist.samplers import ClassBalanced
        >>> sampler = ClassBalanced(labels=np.array([0, 0, 0, 0, 0, 0, 0, 1]))
        >>> rows = sampler.rows(0, num_rows=8, batch_size=8, seed=1)
        >>> int((rows == 7).sum())
        4
    """

    alpha: float = 1.0
    labels: Any = None

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ArgumentError(
                f"`alpha` must be from 0 to 1. Received: alpha={self.alpha!r}. 1 makes classes "
                "equal, 0 leaves them as they are."
            )

    def quotas(self, classes: Classes) -> Rows:
        """Says how many rows of each class are drawn in an epoch."""
        shares = classes.counts.astype(np.float64) ** (1.0 - self.alpha)
        return apportion(classes.num_rows, shares)


@dataclass(frozen=True, eq=False)
class Undersample(ByQuota):
    """Draws as many rows of each class in an epoch as the smallest class has.

    An epoch holds each row at most once, and every row of the smallest class. The next epochs
    take the rows of larger classes that were left out.

    Args:
        labels: As in `ClassBalanced`.

    Example:
        >>> import numpy as np
        >>> from tfdist.samplers import Undersample
        >>> sampler = Undersample(labels=np.array([0, 0, 0, 0, 0, 0, 1, 1]))
        >>> sampler.steps_per_epoch(num_rows=8, batch_size=4)
        1
    """

    labels: Any = None

    def quotas(self, classes: Classes) -> Rows:
        """Says how many rows of each class are drawn in an epoch."""
        quotas: Rows = np.full_like(classes.counts, classes.counts.min())
        return quotas


@dataclass(frozen=True, eq=False)
class Oversample(ByQuota):
    """Draws as many rows of each class in an epoch as the largest class has.

    An epoch holds every row: those of the largest class once, others as often as it takes.

    Args:
        labels: As in `ClassBalanced`.

    Example:
        >>> import numpy as np
        >>> from tfdist.samplers import Oversample
        >>> sampler = Oversample(labels=np.array([0, 0, 0, 0, 0, 0, 1, 1]))
        >>> sampler.steps_per_epoch(num_rows=8, batch_size=4)
        3
    """

    labels: Any = None

    def quotas(self, classes: Classes) -> Rows:
        """Says how many rows of each class are drawn in an epoch."""
        quotas: Rows = np.full_like(classes.counts, classes.counts.max())
        return quotas


def apportion(seats: int, shares: NDArray[np.float64]) -> Rows:
    """Divides a whole number by shares, by largest remainders (Hamilton's method).

    Args:
        seats: What is divided, at least as large as there are shares.
        shares: Above 0; they need not add up to 1.

    Returns:
        int64 array that adds up to `seats`, each at least 1.
    """
    exact = seats * (shares / shares.sum())
    # Rounded to a millionth: machines whose last digits differ must find the same.
    whole: Rows = np.maximum(1, np.floor(exact + 1e-6)).astype(np.int64)
    rest = np.round(exact - whole, 6)
    order = np.argsort(-rest, kind="stable")
    missing = seats - int(whole.sum())
    if missing >= 0:
        whole[order[:missing]] += 1
        return whole
    for number in order[::-1]:  # what rare classes were given more comes from the largest
        taken = min(-missing, int(whole[number]) - 1)
        whole[number] -= taken
        missing += taken
    return whole


class Quotas(Drawing):
    """Draws each class's quota in an epoch, in random order.

    The order is drawn in blocks of at most 65536 draws, each with its part of every quota,
    so that any step is found without going through those before.

    Attributes:
        quotas: Draws of each class in an epoch.

    Args:
        classes: The rows of each class.
        quotas: Draws of each class in an epoch.
    """

    def __init__(self, classes: Classes, quotas: Rows) -> None:
        self.num_rows = classes.num_rows
        self.drawn = int(quotas.sum())
        self._classes = classes
        self.quotas = quotas
        self._passes = Passes(classes, quotas)
        self._plan = functools.lru_cache(maxsize=2)(self._draw_plan)
        self._block = functools.lru_cache(maxsize=4)(self._draw_block)

    def repeats(self, num_rows: int) -> NDArray[np.float64]:
        """Says how often each row is drawn in an epoch; see `Sampler.repeats`."""
        classes = self._classes
        of_member = np.repeat(self.quotas / classes.counts, classes.counts)
        repeats: NDArray[np.float64] = np.bincount(classes.members, of_member, num_rows)  # type: ignore[assignment]
        return repeats

    def stretch(self, epoch: int, start: int, stop: int, batch_size: int, seed: int) -> Rows:
        """Gives the rows of adjacent steps; see `Drawing.stretch`."""
        begin, end = start * batch_size, min(stop * batch_size, self.drawn)
        _, _, edges = self._plan(seed, epoch)
        first = int(np.searchsorted(edges, begin, "right")) - 1
        last = int(np.searchsorted(edges, end, "left"))
        blocks = [self._block(seed, epoch, number) for number in range(first, last)]
        skipped = int(edges[first])
        return np.concatenate(blocks)[begin - skipped : end - skipped]

    def _draw_plan(self, seed: int, epoch: int) -> tuple[Rows, Rows, Rows]:
        """Deals an epoch's draws out to its blocks.

        All draws of the epoch, sorted by class, go to the blocks in turn; so a block gets
        of each class what it should, rounded up or down.

        Returns:
            Draws by block and class, those in the blocks before, and where blocks begin.
        """
        blocks = -(-self.drawn // _BLOCK)
        turn = permute(np.arange(blocks), blocks, (seed, OF_EPOCH, epoch))[:, None]
        edges = np.concatenate([[0], np.cumsum(self.quotas)])
        counts = np.diff(-((turn - edges) // blocks), axis=1)
        before = np.cumsum(counts, 0) - counts
        return counts, before, np.concatenate([[0], np.cumsum(counts.sum(1))])

    def _draw_block(self, seed: int, epoch: int, block: int) -> Rows:
        counts, before, _ = self._plan(seed, epoch)
        firsts = epoch * self.quotas + before[block]
        present = np.flatnonzero(counts[block])
        by_class = np.concatenate(
            [
                self._passes.stretch(seed, int(c), int(firsts[c]), int(counts[block][c]))
                for c in present
            ]
        )
        numbers = np.arange(len(present), dtype=np.min_scalar_type(len(present)))
        classes = np.repeat(numbers, counts[block][present])
        drawn = generator((seed, OF_BLOCK, epoch, block)).permutation(classes)
        rows = np.empty(len(classes), np.int64)
        # A class's rows go in their order to the places that it got, from first to last.
        rows[np.argsort(drawn, kind="stable")] = by_class
        return rows
