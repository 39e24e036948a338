"""Correlated noise, of which later steps subtract a part: its factors and its sensitivity.

Needs neither TensorFlow nor NumPy.
"""

from __future__ import annotations

import functools
import math


@functools.lru_cache(maxsize=16)
def coefficients(bands: int) -> tuple[float, ...]:
    """Returns the factors of a step's own noise and of that of the steps before.

    They are the first coefficients of (1 - x)^(1/2) = 1 - x/2 - x^2/8 - x^3/16 - ... The noise
    in the weights, which is the sum over all steps, then grows much slower than with
    independent noise (Kalinin, McKenna, Upadhyay and Lampert, "Back to square roots", ICLR
    2026: banded inverse square root).

    Args:
        bands: The number of factors, at least 1. 1 is independent noise.

    Returns:
        The factor of a step's own noise, 1, then that of the step before, and so on.
    """
    factors = [1.0]
    for lag in range(1, bands):
        # The quotient of two neighbouring coefficients of the binomial series.
        factors.append(factors[-1] * (2 * lag - 3) / (2 * lag))
    return tuple(factors)


@functools.lru_cache(maxsize=16)
def banded(bands: int) -> tuple[float, ...]:
    """Returns a column of the banded matrix C whose inverse correlates noise, C^-1 z.

    They are the first coefficients of (1 - x)^(-1/2) = 1 + x/2 + 3x^2/8 + ... (Kalinin and
    Lampert, "Banded square root matrix factorization for differentially private model
    training", NeurIPS 2024). Here C has few bands, whereas C^-1 has few bands in
    `coefficients`. So the columns of steps at least `bands` apart have no row in common.

    Args:
        bands: The number of bands, at least 1. 1 is independent noise.

    Returns:
        The factor of a step's own row, 1, then that of the next row, and so on.
    """
    factors = [1.0]
    for lag in range(1, bands):
        factors.append(factors[-1] * (2 * lag - 1) / (2 * lag))
    return tuple(factors)


@functools.lru_cache(maxsize=16)
def banded_norm(bands: int) -> float:
    """Returns the norm of a column: the sensitivity of C g to an example in one step.

    Args:
        bands: As in `banded`. The last columns of a training are cut off, so their norm is
            smaller.
    """
    return math.sqrt(math.fsum(factor**2 for factor in banded(bands)))


@functools.lru_cache(maxsize=16)
def inverse(factors: tuple[float, ...], steps: int) -> tuple[float, ...]:
    """Returns a column of the inverse of a lower triangular Toeplitz matrix.

    Args:
        factors: The first numbers of a column of the matrix, beginning with 1. The others are
            0.
        steps: The length of the result.
    """
    column = [1.0]
    for step in range(1, steps):
        lags = range(1, min(step + 1, len(factors)))
        # By C times its inverse, whose rows below the diagonal are 0.
        column.append(-sum(factors[lag] * column[step - lag] for lag in lags))
    return tuple(column)


@functools.lru_cache(maxsize=4096)
def sensitivity(bands: int, separation: int | None, steps: int, after: int = 0) -> float:
    """Returns the sensitivity of C g to one example, in clipping norms.

    Correlated noise C^-1 z is post-processing of C g + z, where g are the clipped sums of all
    steps. An example in steps 0, s, 2s and so on changes C g by at most the sum of these
    columns of C. This sum has the largest norm of all sets of steps at least s apart, since C
    is a Toeplitz matrix with positive, falling coefficients (Kalinin and Lampert, "Banded
    square root matrix factorization for differentially private model training", NeurIPS 2024,
    theorem 2). C g may depend on earlier releases (Denisov et al., NeurIPS 2022).

    Args:
        bands: As in `coefficients`.
        separation: The least number of steps between two steps in which an example takes part.
            None if it takes part in one step only.
        steps: The number of steps.
        after: The number of steps before these, which are accounted elsewhere. An example's
            part in them changes these steps too. The worst example takes part in the first of
            these steps, and in all steps before it that the separation allows: columns of C
            fall, so an example that comes later changes less.
    """
    factors = coefficients(bands)[1:]
    column: list[float] = []
    parts_before = 0 if separation is None or not after else -(-after // separation)
    begin = parts_before * (separation or 0)
    # Solves C^-1 column = (steps in which the example takes part), row by row.
    for step in range(begin + steps):
        takes_part = step == 0 if separation is None else step % separation == 0
        # The last numbers of the column, the newest first.
        preceding = column[: -len(factors) - 1 : -1] if factors else []
        correlated = sum(f * c for f, c in zip(factors, preceding, strict=False))
        column.append(float(takes_part) - correlated)
    return math.sqrt(sum(value * value for value in column[begin:]))
