"""Sampling from groups of examples in turn, and the correlated noise for it.

Both belong to banded matrix factorization (Choquette-Choo et al., "(Amplified) banded matrix
factorization for differentially private learning", NeurIPS 2023, section 5).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from tfdist.privacy.accounting.ledger import Phase
from tfdist.privacy.sampling.poisson import Accounted, bernoulli
from tfdist.samplers import Rows
from tfdist.samplers.permutation import generator

Tensor = Any


@dataclass(frozen=True)
class CyclicPoisson(Accounted):
    """Draws each row of one group independently. The groups take turns.

    A row's group follows from the seed and the row's number. All groups are equally likely,
    independently of the groups of other rows, and the group is the same in all steps. The
    probability is that of `Poisson` times the number of groups, so a step has `batch_size`
    rows on average.

    Args:
        groups: The number of groups.
    """

    groups: int

    def phase(
        self, *, num_rows: int, batch_size: int, steps: int, noise_multiplier: float
    ) -> Phase:
        """Describes steps of this sampler to the accountant; see `Accounted.phase`."""
        probability = self._probability(num_rows, batch_size)
        return Phase(
            probability, noise_multiplier, steps, None, num_rows, bands=self.groups, cyclic=True
        )

    def expected_rows(self, num_rows: int, batch_size: int) -> float:
        """Returns how many rows a step has on average."""
        return self._probability(num_rows, batch_size) * num_rows / self.groups

    def rows(self, step: int, *, num_rows: int, batch_size: int, seed: int) -> Rows:
        """Returns the rows of one global batch, possibly none; see `Sampler.rows`."""
        members = _members(num_rows, self.groups, seed)[step % self.groups]
        probability = self._probability(num_rows, batch_size)
        rows: Rows = members[bernoulli(generator((seed, step)), len(members), probability)]
        return rows

    def _probability(self, num_rows: int, batch_size: float) -> float:
        return min(1.0, self.groups * batch_size / num_rows)


@functools.lru_cache(maxsize=4)
def _members(num_rows: int, groups: int, seed: int) -> list[NDArray[np.int64]]:
    """Returns the rows of each group, in order."""
    # From another stream than the draws, so a row's group says nothing of its coins.
    group_of = generator((seed, *b"groups")).randint(0, groups, num_rows)
    return [np.flatnonzero(group_of == group) for group in range(groups)]


class Recursion:
    """Noise C^-1 z, where C is a lower triangular Toeplitz matrix with few bands.

    The equation C noise = z is solved row by row: the noise of a step is what it draws minus
    the bands of C times the noise of the steps before (Choquette-Choo et al., algorithm 9).

    Args:
        factors: A column of C, beginning with 1.
        count: The number of random numbers of a step.

    Attributes:
        count: As in the arguments.
    """

    def __init__(self, factors: Sequence[float], count: int) -> None:
        self._factors = np.array(factors[1:])
        self.count = count
        with tf.init_scope(), tf.device("CPU:0"):
            self._before = tf.Variable(  # the noise of the steps before, the last step first
                tf.zeros([len(factors) - 1, count], tf.float64), trainable=False
            )

    def restart(self) -> None:
        """Begins without noise of earlier steps."""
        self._before.assign(tf.zeros_like(self._before))

    def next(self, normal: Tensor) -> Tensor:
        """Returns the noise of the next step.

        Args:
            normal: The random numbers of this step, float64 of shape [count].
        """
        if not len(self._factors):
            return normal
        with tf.device("CPU:0"):
            preceding = self._before.read_value()
            noise = normal - tf.linalg.matvec(preceding, self._factors, transpose_a=True)
            self._before.assign(tf.concat([noise[None], preceding[:-1]], 0))
            return noise
