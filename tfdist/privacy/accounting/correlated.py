"""Noise that later steps take back in part: how much, and what that costs.

Needs neither TensorFlow nor NumPy.
"""

from __future__ import annotations

import functools
import math


@functools.lru_cache(maxsize=16)
def coefficients(bands: int) -> tuple[float, ...]:
    """Says with what factors a step's noise and that of steps before are added up.

    They are the first of (1 - x)^(1/2), which is 1 - x/2 - x^2/8 - x^3/16 - ...: what the
    weights get, the sum of all steps' noise, then grows much slower than that of independent
    noise (Kalinin, McKenna, Upadhyay and Lampert, "Back to square roots", ICLR 2026: banded
    inverse square root).

    Args:
        bands: How many, at least 1; 1 is independent noise.

    Returns:
        The factor of a step's own noise, 1, then that of the step before, and so on.
    """
    found = [1.0]
    for lag in range(1, bands):
        found.append(found[-1] * (2 * lag - 3) / (2 * lag))
    return tuple(found)


@functools.lru_cache(maxsize=16)
def banded(bands: int) -> tuple[float, ...]:
    """Gives a column of the banded matrix C whose inverse correlates noise, C^-1 z.

    They are the first coefficients of (1 - x)^(-1/2), which is 1 + x/2 + 3x^2/8 + ... (Kalinin
    and Lampert, "Banded square root matrix factorization for differentially private model
    training", NeurIPS 2024). Of `coefficients` C^-1 has few bands; here C has, so that steps at
    least `bands` apart have columns without a row in common.

    Args:
        bands: How many, at least 1; 1 is independent noise.

    Returns:
        The factor of a step's own row, 1, then that of the row behind it, and so on.
    """
    found = [1.0]
    for lag in range(1, bands):
        found.append(found[-1] * (2 * lag - 1) / (2 * lag))
    return tuple(found)


@functools.lru_cache(maxsize=16)
def banded_norm(bands: int) -> float:
    """Gives the norm of a column: how far an example's part in one step moves C g.

    Args:
        bands: As in `banded`. The last columns of a training are cut off, and shorter.
    """
    return math.sqrt(math.fsum(factor**2 for factor in banded(bands)))


@functools.lru_cache(maxsize=16)
def inverse(factors: tuple[float, ...], steps: int) -> tuple[float, ...]:
    """Gives a column of the inverse of a lower triangular Toeplitz matrix.

    Args:
        factors: A column of the matrix, the first 1; 0 follow.
        steps: How many.
    """
    found = [1.0]
    for step in range(1, steps):
        lags = range(1, min(step + 1, len(factors)))
        found.append(-sum(factors[lag] * found[step - lag] for lag in lags))
    return tuple(found)


@functools.lru_cache(maxsize=4096)
def sensitivity(bands: int, separation: int | None, steps: int, after: int = 0) -> float:
    """Says how far one example can move what independent noise is added to, over the norm.

    Let the noise be C^-1 z: that is post-processing of C g + z, g the clipped sums of all
    steps. An example in steps 0, s, 2s and so on moves C g by the sum of these columns of C
    at most, which has the largest norm of all sets of steps at least s apart, since C is a
    Toeplitz matrix with coefficients that are positive and fall (Kalinin and Lampert, "Banded
    square root matrix factorization for differentially private model training", NeurIPS 2024,
    theorem 2; that C g may depend on what was released before is in Denisov et al., NeurIPS
    2022).

    Args:
        bands: As in `coefficients`.
        separation: Steps from one that an example takes part in to the next, at least; None
            if it takes part in one step only.
        steps: In all.
        after: Steps that came before these, and are not counted in it. What an example moved
            in them moves these too. The worst is one that takes part in the first of these,
            and in all before it that the separation allows: columns of C fall, so to come
            later moves less.
    """
    factors = coefficients(bands)[1:]
    column: list[float] = []
    before_these = 0 if separation is None or not after else -(-after // separation)
    begin = before_these * (separation or 0)
    for step in range(begin + steps):
        begins = step == 0 if separation is None else step % separation == 0
        before = column[: -len(factors) - 1 : -1] if factors else []
        moved = sum(f * c for f, c in zip(factors, before, strict=False))
        column.append(float(begins) - moved)
    return math.sqrt(sum(value * value for value in column[begin:]))
