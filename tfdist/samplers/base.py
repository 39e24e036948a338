"""What a sampler is, and those that draw every row once an epoch."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from tfdist.samplers.permutation import Rows, permute


class Sampler(abc.ABC):
    """Chooses the rows of each global step.

    Example:
        >>> from dataclasses import dataclass
        >>> import numpy as np
        >>> @dataclass(frozen=True)
        ... class WithReplacement(Sampler):
        ...     def rows(self, step, *, num_rows, batch_size, seed):
        ...         rng = np.random.default_rng((seed, step))
        ...         return rng.integers(num_rows, size=batch_size)
        >>> WithReplacement().rows(5, num_rows=10, batch_size=4, seed=0).shape
        (4,)

    Attributes:
        may_be_empty: Whether a step may have no rows: then it updates with gradients of 0.
    """

    may_be_empty: ClassVar[bool] = False

    @property
    def group_of(self) -> Rows | None:
        """A number for each row; rows of one number that follow each other stay on a replica.

        None if every row is by itself.
        """
        return None

    def bind(self, targets: Any, num_rows: int) -> Sampler:
        """Gives the sampler that draws from particular data; by default, this one.

        Args:
            targets: `y` of `fit`: arrays, nested or not, or None.
            num_rows: Examples in the data, at least 1.

        Raises:
            ArgumentError: The sampler cannot draw from these data.
        """
        return self

    def steps_per_epoch(self, num_rows: int, batch_size: int) -> int:
        """Says how many steps make an epoch.

        Args:
            num_rows: Examples in the data, at least 1.
            batch_size: Examples of a full global batch, at least 1.

        Returns:
            Steps until every example was drawn once; the last batch may be smaller.
        """
        return -(-num_rows // batch_size)

    def repeats(self, num_rows: int) -> NDArray[np.float64] | None:
        """Says how often each row is drawn in an epoch, on average.

        Args:
            num_rows: Examples in the data, at least 1.

        Returns:
            Array of shape [num_rows], or None if the sampler does not know.
        """
        return None

    @abc.abstractmethod
    def rows(self, step: int, *, num_rows: int, batch_size: int, seed: int) -> Rows:
        """Gives the rows of one global batch.

        Args:
            step: The steps before this one since training began.
            num_rows: Examples in the data.
            batch_size: Examples of a full global batch.
            seed: Another seed, below 2**63, gives another order.

        Returns:
            int64 array of shape [n], values in [0, num_rows); n >= 1, unless the sampler
            sets `may_be_empty`.
        """

    def batches(
        self, first: int, count: int, *, num_rows: int, batch_size: int, seed: int
    ) -> list[Rows]:
        """Gives the rows of several steps; override it where together is cheaper.

        Args:
            first: The first step.
            count: How many steps.
            num_rows: As in `rows`.
            batch_size: As in `rows`.
            seed: As in `rows`.
        """
        settings = {"num_rows": num_rows, "batch_size": batch_size, "seed": seed}
        return [self.rows(step, **settings) for step in range(first, first + count)]


@dataclass(frozen=True)
class Sequential(Sampler):
    """Takes rows in the order they have."""

    def repeats(self, num_rows: int) -> NDArray[np.float64]:
        """Says how often each row is drawn in an epoch; see `Sampler.repeats`."""
        return np.ones(num_rows)

    def rows(self, step: int, *, num_rows: int, batch_size: int, seed: int) -> Rows:
        """Gives the rows of one global batch; see `Sampler.rows`."""
        start = step % self.steps_per_epoch(num_rows, batch_size) * batch_size
        return np.arange(start, min(start + batch_size, num_rows))


@dataclass(frozen=True)
class Uniform(Sampler):
    """Draws every row once an epoch, in an order of its own each epoch. The default.

    The order is a pseudo-random permutation, evaluated where it is needed; see `permute`.

    Args:
        by_batch: Keep the rows of a batch together and shuffle the batches, as Keras's
            `shuffle="batch"` does, for data that is slow to read out of order.
    """

    by_batch: bool = False

    def repeats(self, num_rows: int) -> NDArray[np.float64]:
        """Says how often each row is drawn in an epoch; see `Sampler.repeats`."""
        return np.ones(num_rows)

    def rows(self, step: int, *, num_rows: int, batch_size: int, seed: int) -> Rows:
        """Gives the rows of one global batch; see `Sampler.rows`."""
        return self.batches(step, 1, num_rows=num_rows, batch_size=batch_size, seed=seed)[0]

    def batches(
        self, first: int, count: int, *, num_rows: int, batch_size: int, seed: int
    ) -> list[Rows]:
        """Gives the rows of several steps, permuting each epoch's positions at once."""
        steps = self.steps_per_epoch(num_rows, batch_size)
        found: list[Rows] = []
        while len(found) < count:
            epoch, start = divmod(first + len(found), steps)
            stop = min(steps, start + count - len(found))
            key = (seed, epoch)
            if self.by_batch:
                chosen = permute(np.arange(start, stop), steps, key)
                edges = [(b * batch_size, min((b + 1) * batch_size, num_rows)) for b in chosen]
                found += [np.arange(begin, end) for begin, end in edges]
            else:
                positions = np.arange(start * batch_size, min(stop * batch_size, num_rows))
                rows = permute(positions, num_rows, key)
                found += np.split(rows, range(batch_size, len(rows), batch_size))
        return found


def from_shuffle(shuffle: bool | str) -> Sampler:
    """Translates the `shuffle` argument of `fit`.

    Args:
        shuffle: True, False or "batch".
    """
    if shuffle == "batch":
        return Uniform(by_batch=True)
    return Uniform() if shuffle else Sequential()
