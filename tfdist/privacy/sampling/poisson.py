"""Poisson sampling: each step draws each row independently, with the same probability."""

from __future__ import annotations

import abc
import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tfdist.privacy.accounting.arguments import check_count
from tfdist.privacy.accounting.dp_sgd import capacity as choose_capacity
from tfdist.privacy.accounting.ledger import Phase
from tfdist.samplers import Rows, Sampler
from tfdist.samplers.permutation import generator


class Accounted(Sampler):
    """A sampler whose steps can be described to the accountant.

    Attributes:
        draws_as_accounted: Whether it draws as it describes. Each class must say so itself: a
            subclass may draw otherwise.
    """

    may_be_empty: ClassVar[bool] = True
    draws_as_accounted: ClassVar[bool] = False

    @abc.abstractmethod
    def phase(
        self, *, num_rows: int, batch_size: int, steps: int, noise_multiplier: float
    ) -> Phase:
        """Describes steps of this sampler to the accountant.

        Args:
            num_rows: Examples in the data.
            batch_size: Expected examples of a global batch.
            steps: How many steps.
            noise_multiplier: As in `Phase`.
        """

    @abc.abstractmethod
    def expected_rows(self, num_rows: int, batch_size: int) -> float:
        """Returns the mean number of rows of a step, before any are left out.

        Args:
            num_rows: Examples in the data.
            batch_size: Expected examples of a global batch.
        """

    def expected_units(self, num_rows: int, batch_size: int) -> float:
        """Returns the mean number of units of a step, each of which is clipped separately.

        Args:
            num_rows: Examples in the data.
            batch_size: Expected examples of a global batch.
        """
        return self.expected_rows(num_rows, batch_size)


def draws_as_accounted(sampler: Sampler) -> bool:
    """Returns whether the class of a sampler says that it draws as the accountant takes it.

    Args:
        sampler: Any sampler.
    """
    return vars(type(sampler)).get("draws_as_accounted", False) is True


@dataclass(frozen=True)
class Poisson(Accounted):
    """Draws each row into each step independently, with probability batch_size / num_rows.

    This is the sampling that the accounting of DP-SGD assumes (Abadi et al., "Deep learning
    with differential privacy", CCS 2016, section 3.1). Batches vary in size around
    `batch_size`, and may be empty. In an epoch, a row may occur twice or not at all. The rows
    of a step are sorted.

    Whoever knows the seed knows the drawn rows, so the guarantee needs a secret seed.

    Args:
        capacity: The most rows of a step. If more are drawn, a random choice of `capacity` rows
            stays. With None, `tfdist.privacy.capacity` chooses a capacity that costs almost
            nothing.

    Raises:
        ArgumentError: The capacity is not a whole number of at least 1.

    Example:
        >>> import tfdist
        >>> sampler = tfdist.privacy.Poisson(capacity=100)
        >>> rows = sampler.rows(5, num_rows=10000, batch_size=64, seed=0)
        >>> 30 < len(rows) <= 100
        True
    """

    draws_as_accounted = True

    capacity: int | None = None

    def __post_init__(self) -> None:
        if self.capacity is not None:
            check_count("capacity", self.capacity, 1)

    def phase(
        self, *, num_rows: int, batch_size: int, steps: int, noise_multiplier: float
    ) -> Phase:
        """Describes steps of this sampler to the accountant; see `Accounted.phase`."""
        capacity = self.capacity_for(num_rows, batch_size)
        probability = _probability(num_rows, batch_size)
        return Phase(probability, noise_multiplier, steps, capacity, num_rows)

    def expected_rows(self, num_rows: int, batch_size: int) -> float:
        """Returns the mean number of rows of a step, before any are left out."""
        return _probability(num_rows, batch_size) * num_rows

    def capacity_for(self, num_rows: int, batch_size: float) -> int:
        """Returns the largest number of rows of a step.

        Args:
            num_rows: Examples in the data.
            batch_size: Expected examples of a global batch.
        """
        if self.capacity is not None:
            return min(self.capacity, num_rows)
        return _chosen_capacity(num_rows, batch_size)

    def rows(self, step: int, *, num_rows: int, batch_size: float, seed: int) -> Rows:
        """Returns the rows of one global batch, possibly none; see `Sampler.rows`."""
        random = generator((seed, step))
        rows = bernoulli(random, num_rows, _probability(num_rows, batch_size))
        capacity = self.capacity_for(num_rows, batch_size)
        if len(rows) > capacity:
            # The accounting of a capacity assumes that all choices are equally likely.
            rows = np.sort(random.permutation(rows)[:capacity])
        return rows


def _probability(num_rows: int, batch_size: float) -> float:
    return min(1.0, batch_size / num_rows)


@functools.lru_cache(maxsize=16)
def _chosen_capacity(num_rows: int, batch_size: float) -> int:
    probability = _probability(num_rows, batch_size)
    return choose_capacity(num_rows=num_rows, sampling_probability=probability)


def bernoulli(random: np.random.RandomState, trials: int, probability: float) -> Rows:
    """Returns the numbers of the trials that succeed, by drawing the gaps between them.

    The gaps between successes of independent trials are geometric (Devroye, "Non-uniform
    random variate generation", 1986, section X.4). So the time depends on the number of
    successes, not of trials.
    """
    expected = trials * probability
    at_once = int(expected + 5 * math.sqrt(expected)) + 8
    parts: list[Rows] = []
    last = -1
    while last < trials:
        # A gap beyond the trials ends the search. A sum of huge gaps would overflow.
        gaps = np.minimum(random.geometric(probability, at_once), trials + 1)
        parts.append(last + np.cumsum(gaps, dtype=np.int64))
        last = int(parts[-1][-1])
    numbers = np.concatenate(parts)
    return numbers[: np.searchsorted(numbers, trials)]
