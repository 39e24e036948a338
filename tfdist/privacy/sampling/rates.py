"""Poisson sampling with unequal probabilities, taken from another sampler."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfdist.errors import ArgumentError
from tfdist.privacy.accounting.ledger import Phase
from tfdist.privacy.sampling.poisson import Accounted, bernoulli
from tfdist.samplers import Rows, Sampler
from tfdist.samplers.permutation import generator


@dataclass(frozen=True, eq=False)
class PoissonLike(Accounted):
    """Draws each row into each step independently, on average as often as another sampler.

    So private training can rebalance classes: rows of rare classes get a larger probability. A
    row that the other sampler draws r times in an epoch of R draws is drawn into a step with
    probability min(1, batch_size * r / R). All steps are accounted as if every row had the
    largest of these probabilities. This is safe: a row with a smaller probability is no less
    private, since the draws of other rows are independent of it. So it costs more than
    `Poisson`, about as much as the rarest class becomes more frequent.

    The guarantee assumes that the probabilities are public, with all that they are computed
    from, such as the number of examples of each class.

    Batches vary in size around `batch_size`, without a limit. An epoch has as many steps as an
    epoch of the other sampler.

    Args:
        sampler: A sampler that knows how often it draws each row (`Sampler.repeats`), such as
            `tfdist.samplers.ClassBalanced()` or `Weighted(weights)`.

    Raises:
        ArgumentError: It is not a sampler, or does not know how often it draws rows.

    Example:
        >>> import numpy as np
        >>> import tfdist
        >>> labels = np.repeat([0, 1], [900, 100])
        >>> balanced = tfdist.samplers.ClassBalanced(labels=labels)
        >>> sampler = tfdist.privacy.PoissonLike(balanced).bind(None, 1000)
        >>> settings = {"num_rows": 1000, "batch_size": 20}
        >>> phase = sampler.phase(**settings, steps=50, noise_multiplier=1.0)
        >>> round(phase.sampling_probability, 3)  # 20 * 0.5 / 100, not 20 / 1000
        0.1
    """

    draws_as_accounted = True

    sampler: Sampler

    def __post_init__(self) -> None:
        if not isinstance(self.sampler, Sampler):
            raise ArgumentError(
                "`sampler` of PoissonLike must be a sampler. Received: "
                f"sampler={self.sampler!r}. Pass for example tfdist.samplers.ClassBalanced()."
            )

    def bind(self, targets: Any, num_rows: int) -> PoissonLike:
        """Binds the other sampler to the data, and checks that it knows its draws."""
        bound = self.sampler.bind(targets, num_rows)
        if bound.repeats(num_rows) is None:
            raise ArgumentError(
                "`sampler` of PoissonLike must know how often it draws each row. Received: "
                f"sampler of type {type(self.sampler).__name__}, whose `repeats` returns None. "
                "Use tfdist.samplers.Weighted(weights)."
            )
        return PoissonLike(bound)

    def steps_per_epoch(self, num_rows: int, batch_size: int) -> int:
        """Returns the steps of an epoch of the other sampler."""
        return self.sampler.steps_per_epoch(num_rows, batch_size)

    def repeats(self, num_rows: int) -> NDArray[np.float64] | None:
        """Returns how often each row is drawn in an epoch; see `Sampler.repeats`."""
        return self.sampler.repeats(num_rows)

    def phase(
        self, *, num_rows: int, batch_size: int, steps: int, noise_multiplier: float
    ) -> Phase:
        """Describes steps of this sampler to the accountant; see `Accounted.phase`."""
        _, largest = self._probabilities(num_rows, batch_size)
        return Phase(largest, noise_multiplier, steps, None, num_rows, at_most=True)

    def expected_rows(self, num_rows: int, batch_size: int) -> float:
        """Returns how many rows a step has on average."""
        probabilities, _ = self._probabilities(num_rows, batch_size)
        return float(probabilities.sum())

    def rows(self, step: int, *, num_rows: int, batch_size: int, seed: int) -> Rows:
        """Returns the rows of one global batch, possibly none; see `Sampler.rows`."""
        probabilities, largest = self._probabilities(num_rows, batch_size)
        random = generator((seed, step))
        # Each row is drawn with the largest probability, and stays with its fraction of that.
        candidates = bernoulli(random, num_rows, largest)
        rows: Rows = candidates[
            random.random_sample(len(candidates)) * largest < probabilities[candidates]
        ]
        return rows

    @functools.cached_property
    def _probabilities(self) -> Any:
        return functools.lru_cache(maxsize=2)(self._find_probabilities)

    def _find_probabilities(
        self, num_rows: int, batch_size: int
    ) -> tuple[NDArray[np.float64], float]:
        """Returns the probabilities of all rows, and the largest one."""
        repeats = self.sampler.repeats(num_rows)
        assert repeats is not None  # `bind` has looked
        probabilities: NDArray[np.float64] = np.minimum(
            1.0, batch_size * repeats / repeats.sum()
        )
        return probabilities, float(probabilities.max())
