"""The base class of samplers, and the samplers that draw every row once an epoch."""

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
        may_be_empty: Whether a step may have no rows; such a step has gradients of 0.
    """

    may_be_empty: ClassVar[bool] = False

    @property
    def group_of(self) -> Rows | None:
        """The group number of each row, or None if there are no groups.

        Adjacent rows of the same group stay on one replica.
        """
        return None

    def bind(self, targets: Any, num_rows: int) -> Sampler:
        """Returns the sampler for particular data; by default, this sampler itself.

        Args:
            targets: `y` of `fit`: arrays, nested or not, or None.
            num_rows: Examples in the data, at least 1.

        Raises:
            ArgumentError: The sampler cannot draw from these data.
        """
        return self

    def steps_per_epoch(self, num_rows: int, batch_size: int) -> int:
        """Returns the steps of an epoch.

        Args:
            num_rows: Examples in the data, at least 1.
            batch_size: Examples of a full global batch, at least 1.

        Returns:
            Steps until every example is drawn once; the last batch may be smaller.
        """
        return -(-num_rows // batch_size)

    def repeats(self, num_rows: int) -> NDArray[np.float64] | None:
        """Returns how often each row is drawn in an epoch, on average.

        Args:
            num_rows: Examples in the data, at least 1.

        Returns:
            Array of shape [num_rows], or None if the sampler does not know.
        """
        return None

    @abc.abstractmethod
    def rows(self, step: int, *, num_rows: int, batch_size: int, seed: int) -> Rows:
        """Returns the rows of one global batch.

        Args:
            step: The number of the step since training began, from 0.
            num_rows: Examples in the data.
            batch_size: Examples of a full global batch.
            seed: Chooses the order, from 0 to below 2**63.

        Returns:
            int64 array of shape [n] with values in [0, num_rows). n is at least 1, unless the
            sampler sets `may_be_empty`.
        """

    def batches(
        self, first: int, count: int, *, num_rows: int, batch_size: int, seed: int
    ) -> list[Rows]:
        """Returns the rows of several steps; override it if that is cheaper than single steps.

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
    """Takes rows in their own order, without shuffling."""

    def repeats(self, num_rows: int) -> NDArray[np.float64]:
        """Returns how often each row is drawn in an epoch; see `Sampler.repeats`."""
        return np.ones(num_rows)

    def rows(self, step: int, *, num_rows: int, batch_size: int, seed: int) -> Rows:
        """Returns the rows of one global batch; see `Sampler.rows`."""
        start = step % self.steps_per_epoch(num_rows, batch_size) * batch_size
        return np.arange(start, min(start + batch_size, num_rows))


@dataclass(frozen=True)
class Uniform(Sampler):
    """Draws every row once an epoch, in a new random order each epoch. The default.

    The order is a pseudo-random permutation that is computed only where it is needed; see
    `permute`.

    Args:
        by_batch: Shuffle whole batches and keep the rows of a batch together, like Keras's
            `shuffle="batch"`. For data that is slow to read out of order.
    """

    by_batch: bool = False

    def repeats(self, num_rows: int) -> NDArray[np.float64]:
        """Returns how often each row is drawn in an epoch; see `Sampler.repeats`."""
        return np.ones(num_rows)

    def rows(self, step: int, *, num_rows: int, batch_size: int, seed: int) -> Rows:
        """Returns the rows of one global batch; see `Sampler.rows`."""
        return self.batches(step, 1, num_rows=num_rows, batch_size=batch_size, seed=seed)[0]

    def batches(
        self, first: int, count: int, *, num_rows: int, batch_size: int, seed: int
    ) -> list[Rows]:
        """Returns the rows of several steps; permutes each epoch's positions in one call."""
        steps = self.steps_per_epoch(num_rows, batch_size)
        batches: list[Rows] = []
        while len(batches) < count:
            epoch, start = divmod(first + len(batches), steps)
            stop = min(steps, start + count - len(batches))
            key = (seed, epoch)
            if self.by_batch:
                batch_numbers = permute(np.arange(start, stop), steps, key)
                edges = [
                    (b * batch_size, min((b + 1) * batch_size, num_rows)) for b in batch_numbers
                ]
                batches += [np.arange(begin, end) for begin, end in edges]
            else:
                positions = np.arange(start * batch_size, min(stop * batch_size, num_rows))
                rows = permute(positions, num_rows, key)
                batches += np.split(rows, range(batch_size, len(rows), batch_size))
        return batches


def from_shuffle(shuffle: bool | str) -> Sampler:
    """Translates the `shuffle` argument of `fit`.

    Args:
        shuffle: True, False or "batch".
    """
    if shuffle == "batch":
        return Uniform(by_batch=True)
    return Uniform() if shuffle else Sequential()
