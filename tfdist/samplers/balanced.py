"""Samplers that set how often each class is drawn."""

from __future__ import annotations

import abc
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfdist.errors import ArgumentError
from tfdist.samplers.classes import Classes, group_rows
from tfdist.samplers.labelled import OF_BLOCK, OF_EPOCH, BoundSampler, Labelled, Passes
from tfdist.samplers.permutation import Rows, generator, permute

_BLOCK = 2**16


class ByQuota(Labelled):
    """Draws a fixed number of rows of each class an epoch."""

    @abc.abstractmethod
    def quotas(self, classes: Classes) -> Rows:
        """Returns how many rows of each class are drawn in an epoch."""

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
    """Draws class c with a probability proportional to n_c^(1-alpha), where c has n_c rows.

    With alpha 0 the classes keep their shares. With alpha 1 the shares are equal. Alpha 1/2 is
    square-root sampling (Kang et al., "Decoupling representation and classifier for
    long-tailed recognition", ICLR 2020, section 3, where q = 1 - alpha).

    An epoch has as many draws as the data has rows. Each class gets its share of the draws,
    rounded, and the order is random. Within a class, no row comes a second time before all
    other rows of the class have come, even across epochs.

    With multi-label targets, the sampler draws a class and then a row with this label
    (class-aware sampling; Shen et al., "Relay backpropagation", ECCV 2016, section 3.2). Rows
    without any label form one more class.

    Args:
        alpha: How far to balance the classes, from 0 to 1.
        labels: The class of each row, an array of shape [rows], or of shape [rows, classes]
            with zeros and ones; `y` of `fit` if None.

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
        """Returns how many rows of each class are drawn in an epoch."""
        shares = classes.counts.astype(np.float64) ** (1.0 - self.alpha)
        return apportion(classes.num_rows, shares)


@dataclass(frozen=True, eq=False)
class Undersample(ByQuota):
    """Draws as many rows of each class in an epoch as the smallest class has.

    An epoch has every row of the smallest class once, and each other row at most once. The
    next epochs take the rows that were left out.

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
        """Returns how many rows of each class are drawn in an epoch."""
        quotas: Rows = np.full_like(classes.counts, classes.counts.min())
        return quotas


@dataclass(frozen=True, eq=False)
class Oversample(ByQuota):
    """Draws as many rows of each class in an epoch as the largest class has.

    An epoch has every row of the largest class once, and rows of other classes several times.

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
        """Returns how many rows of each class are drawn in an epoch."""
        quotas: Rows = np.full_like(classes.counts, classes.counts.max())
        return quotas


def apportion(seats: int, shares: NDArray[np.float64]) -> Rows:
    """Divides a whole number in proportion to shares, by Hamilton's largest remainders.

    Args:
        seats: The number to divide, not below the number of shares.
        shares: The shares, above 0; they need not add up to 1.

    Returns:
        int64 array that adds up to `seats`, with values of at least 1.
    """
    exact = seats * (shares / shares.sum())
    # Rounded to a millionth, so that machines with different last digits agree.
    seats_of: Rows = np.maximum(1, np.floor(exact + 1e-6)).astype(np.int64)
    remainders = np.round(exact - seats_of, 6)
    order = np.argsort(-remainders, kind="stable")
    missing = seats - int(seats_of.sum())
    if missing >= 0:
        seats_of[order[:missing]] += 1
        return seats_of
    for number in order[::-1]:  # the minimum of 1 gave rare classes too many seats
        num_taken = min(-missing, int(seats_of[number]) - 1)
        seats_of[number] -= num_taken
        missing += num_taken
    return seats_of


class Quotas(BoundSampler):
    """Draws each class's quota in an epoch, in random order.

    The order is drawn in blocks of at most 65536 draws. Each block has its part of every
    quota, so the rows of any step can be computed without the steps before.

    Attributes:
        quotas: Draws of each class in an epoch.

    Args:
        classes: The rows of each class.
        quotas: Draws of each class in an epoch.
    """

    def __init__(self, classes: Classes, quotas: Rows) -> None:
        self.num_rows = classes.num_rows
        self.draws_per_epoch = int(quotas.sum())
        self._classes = classes
        self.quotas = quotas
        self._passes = Passes(classes, quotas)
        self._plan = functools.lru_cache(maxsize=2)(self._draw_plan)
        self._block = functools.lru_cache(maxsize=4)(self._draw_block)

    def repeats(self, num_rows: int) -> NDArray[np.float64]:
        """Returns how often each row is drawn in an epoch; see `Sampler.repeats`."""
        classes = self._classes
        of_member = np.repeat(self.quotas / classes.counts, classes.counts)
        repeats: NDArray[np.float64] = np.bincount(classes.members, of_member, num_rows)  # type: ignore[assignment]
        return repeats

    def stretch(self, epoch: int, start: int, stop: int, batch_size: int, seed: int) -> Rows:
        """Returns the rows of adjacent steps; see `BoundSampler.stretch`."""
        begin, end = start * batch_size, min(stop * batch_size, self.draws_per_epoch)
        _, _, edges = self._plan(seed, epoch)
        first = int(np.searchsorted(edges, begin, "right")) - 1
        last = int(np.searchsorted(edges, end, "left"))
        blocks = [self._block(seed, epoch, number) for number in range(first, last)]
        skipped = int(edges[first])
        return np.concatenate(blocks)[begin - skipped : end - skipped]

    def _draw_plan(self, seed: int, epoch: int) -> tuple[Rows, Rows, Rows]:
        """Distributes an epoch's draws over its blocks.

        All draws of the epoch are sorted by class and go to the blocks in turn. So each block
        gets its part of every class, rounded up or down.

        Returns:
            Draws by block and class, the draws in earlier blocks, and where blocks begin.
        """
        blocks = -(-self.draws_per_epoch // _BLOCK)
        turn = permute(np.arange(blocks), blocks, (seed, OF_EPOCH, epoch))[:, None]
        edges = np.concatenate([[0], np.cumsum(self.quotas)])
        # Draw i, in the order of classes, goes to the block whose turn is i % blocks. Below i
        # there are ceil((i - turn) / blocks) draws of that block.
        counts = np.diff(-((turn - edges) // blocks), axis=1)
        before = np.cumsum(counts, 0) - counts
        return counts, before, np.concatenate([[0], np.cumsum(counts.sum(1))])

    def _draw_block(self, seed: int, epoch: int, block: int) -> Rows:
        counts, before, _ = self._plan(seed, epoch)
        # The passes through a class go on from epoch to epoch: each of its rows is drawn once
        # before the first one is drawn again.
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
        class_order = generator((seed, OF_BLOCK, epoch, block)).permutation(classes)
        rows = np.empty(len(classes), np.int64)
        # The rows of a class fill its positions from the first to the last.
        rows[np.argsort(class_order, kind="stable")] = by_class
        return rows
