"""A sampler that draws rows in proportion to weights."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfdist.errors import ArgumentError
from tfdist.samplers.labelled import OF_BLOCK, OF_EPOCH, BoundSampler
from tfdist.samplers.permutation import Rows, generator, permute


@dataclass(frozen=True, eq=False)
class Weighted(BoundSampler):
    """Draws each row with a probability proportional to its weight.

    An epoch has as many draws as the data has rows. A row with weight w is drawn
    n*w/sum(weights) times in it. This number is rounded up or down at random, so that the
    expectation is exact: systematic sampling, which has less variance than independent draws
    (Cochran, "Sampling Techniques", 1977, section 9A.5; Douc and Cappé, "Comparison of
    resampling schemes for particle filtering", 2005, section 2.4). With equal weights every
    row is drawn once. The order is random.

    Args:
        weights: Array of shape [rows] with values of 0 or more, not all 0.

    Raises:
        ArgumentError: A weight is negative, NaN or infinite, or all are 0.

    Example:
        >>> import numpy as np
        >>> from tfdist.samplers import Weighted
        >>> sampler = Weighted(np.array([1.0, 1.0, 2.0, 0.0]))
        >>> rows = sampler.rows(0, num_rows=4, batch_size=4, seed=1)
        >>> np.sort(rows).tolist()
        [0, 1, 2, 2]
    """

    weights: Any

    def __post_init__(self) -> None:
        weights = np.asarray(self.weights, np.float64)
        if weights.ndim != 1 or weights.size == 0:
            raise ArgumentError(
                "`weights` must have one number for each row. Received: weights with shape "
                f"{weights.shape}."
            )
        wrong = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
        if len(wrong):
            raise ArgumentError(
                "`weights` must be 0 or more, and finite. Received: "
                f"weights[{wrong[0]}]={weights[wrong[0]]}, and {len(wrong) - 1} more such."
            )
        if not weights.any():
            raise ArgumentError("`weights` must not all be 0. Received: only zeros.")

    @functools.cached_property
    def num_rows(self) -> int:  # type: ignore[override]
        """Rows of the data."""
        return len(self.weights)

    @property
    def draws_per_epoch(self) -> int:  # type: ignore[override]
        """Rows drawn in an epoch."""
        return self.num_rows

    def bind(self, targets: Any, num_rows: int) -> Weighted:
        """Checks that there is a weight for each row; see `Sampler.bind`."""
        self.check_rows(num_rows)
        return self

    def repeats(self, num_rows: int) -> NDArray[np.float64]:
        """Returns how often each row is drawn in an epoch; see `Sampler.repeats`."""
        return np.diff(self._ends, prepend=0.0)

    def stretch(self, epoch: int, start: int, stop: int, batch_size: int, seed: int) -> Rows:
        """Returns the rows of adjacent steps; see `BoundSampler.stretch`."""
        positions = np.arange(start * batch_size, min(stop * batch_size, self.num_rows))
        places = permute(positions, self.num_rows, (seed, OF_BLOCK, epoch))
        rows: Rows = self._epoch_of((seed, OF_EPOCH, epoch))[places].astype(np.int64)
        return rows

    @functools.cached_property
    def _ends(self) -> NDArray[np.float64]:
        """The ends of adjacent intervals, one a row, whose lengths are the expected draws."""
        ends = np.cumsum(np.asarray(self.weights, np.float64))
        ends *= self.num_rows / ends[-1]
        # Rounded, so that equal weights give whole numbers and all machines the same digits.
        return np.round(ends, 6)

    @functools.cached_property
    def _epoch_of(self) -> Any:
        return functools.lru_cache(maxsize=1)(self._draw_epoch)

    def _draw_epoch(self, key: tuple[int, ...]) -> NDArray[Any]:
        """Lists the rows of an epoch, in the order of the data."""
        # Grid points have distance 1 and a random offset. A row is drawn once for each point
        # in its interval.
        shifted = np.floor(self._ends + generator(key).random_sample()).astype(np.int64)
        rows = np.arange(self.num_rows, dtype=np.min_scalar_type(self.num_rows))
        return np.repeat(rows, np.diff(shifted, prepend=0))
