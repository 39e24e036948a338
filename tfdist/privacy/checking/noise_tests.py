"""Statistical tests of independent normal numbers with mean 0 and variance 1."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tfdist.privacy.checking.report import Finding, of_probability

Floats = NDArray[np.float64]
_FOUND_WITH = 0.999
_LAGS = 8
_SORTED = 200_000  # the most numbers that are compared with the normal distribution
_GRID = 2.0**-6  # of the noise, in standard deviations; see `tfdist.privacy.mechanism.grid`
_MEDIAN = 0.6744897501960817  # of the absolute value of a normal number
_FEWEST_FOR_KURTOSIS = 100_000  # with fewer numbers, its distribution is too skewed


class Block(NamedTuple):
    """The columns of one variable.

    Attributes:
        name: The variable's name.
        columns: The first and the last column.
    """

    name: str
    columns: slice


def noise_facts(z: Floats, blocks: Sequence[Block], alpha: float) -> list[Finding]:
    """Tests noise that is divided by its expected standard deviation.

    Args:
        z: The noise, shape [steps, weights].
        blocks: The columns of each variable.
        alpha: The probability of a false alarm of each test.

    Returns:
        At most 12 findings.
    """
    facts = [deviation(z, alpha), _by_variable(z, blocks, alpha)]
    # The other tests use noise of variance 1, so that they do not fail for the deviation too.
    z = z / max(1e-300, math.sqrt(float((z**2).mean())))
    facts += [_mean(z, alpha), *_shape(z, alpha)]
    facts += [_pairs(z, alpha), _pairs_of_sizes(z, alpha), _lags(z, alpha)]
    return [*facts, *_weights(z, alpha), _variables(z, blocks, alpha)]


def smallest_error(count: int, alpha: float) -> float:
    """Returns the lack of standard deviation that is found with a probability of 0.999.

    Args:
        count: The number of normal numbers.
        alpha: The probability of a false alarm.

    Returns:
        The relative lack: of 0.01, noise of 0.99 times its deviation is found.
    """
    chi2 = _stats().chi2
    least, largest = chi2.ppf(alpha / 2, count), chi2.ppf(_FOUND_WITH, count)
    return float(1 - math.sqrt(least / largest))


def deviation(z: Floats, alpha: float) -> Finding:
    """Compares a standard deviation with 1, by the chi-squared distribution of squares.

    Args:
        z: Numbers of any shape.
        alpha: The probability of a false alarm.
    """
    chi2, count = _stats().chi2, z.size
    lowest, highest = (
        math.sqrt(quantile / count)
        for quantile in (chi2.ppf(alpha / 2, count), chi2.isf(alpha / 2, count))
    )
    return Finding(
        "noise: standard deviation over the right one",
        math.sqrt(float((z**2).mean())),
        1.0,
        lowest,
        highest,
        f"{count} numbers; finds a lack of {smallest_error(count, alpha):.2%} with "
        f"probability {_FOUND_WITH}",
    )


def _by_variable(z: Floats, blocks: Sequence[Block], alpha: float) -> Finding:
    probabilities = [
        (_of_squares(float((z[:, b.columns] ** 2).sum()), z[:, b.columns].size), b.name)
        for b in blocks
    ]
    probability, name = min(probabilities)
    least = min(z[:, b.columns].size for b in blocks)
    return of_probability(
        "noise: standard deviation of each variable",
        probability * len(blocks),
        alpha,
        f"{len(blocks)} variables, the worst {name}; finds a lack of "
        f"{smallest_error(least, alpha / len(blocks)):.1%} in each",
    )


def _of_squares(squares: float, count: int) -> float:
    chi2 = _stats().chi2
    return 2 * float(min(chi2.cdf(squares, count), chi2.sf(squares, count)))


def _mean(z: Floats, alpha: float) -> Finding:
    score = float(z.sum()) / math.sqrt(z.size)
    return of_probability("noise: mean 0", _two_sided(score), alpha)


def _shape(z: Floats, alpha: float) -> list[Finding]:
    stats, flat = _stats(), z.ravel()
    some = flat[:: max(1, flat.size // _SORTED)]
    # Noise is rounded to a grid. The test would find its steps, so they are filled at random.
    within = np.random.default_rng(1).random(some.size) - 0.5
    normal = stats.kstest(some + within * _GRID, "norm").pvalue
    facts = [of_probability("noise: normal, by Kolmogorov and Smirnov", normal, alpha)]
    if flat.size >= _FEWEST_FOR_KURTOSIS:
        score = float((flat**4).mean() - 6 * (flat**2).mean() + 3) / math.sqrt(24 / flat.size)
        detail = f"fourth moment {float((flat**4).mean()):.4f}, wanted 3"
        facts.append(of_probability("noise: kurtosis", _two_sided(score), alpha, detail))
    tails = []
    for limit in (2.5, 3.5, 4.5):
        beyond = int((np.abs(flat) > limit).sum())
        tails.append(_of_count(beyond, flat.size, 2 * float(stats.norm.sf(limit))))
    detail = "numbers beyond 2.5, 3.5 and 4.5 standard deviations"
    return [*facts, of_probability("noise: tails", len(tails) * min(tails), alpha, detail)]


def _pairs(z: Floats, alpha: float) -> Finding:
    """Correlates all pairs of steps. Repeated noise has a correlation of 1."""
    steps, width = z.shape
    largest, probability = 0.0, 1.0
    if steps > 1 and width > 3:
        centred = z - z.mean(1, keepdims=True)
        centred /= np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-300)
        correlations = np.abs(centred @ centred.T)[np.triu_indices(steps, 1)]
        largest = float(min(1.0, correlations.max()))
        probability = _of_correlation(largest, width - 2) * len(correlations)
    return of_probability(
        "noise: independent between steps",
        probability,
        alpha,
        f"{steps} steps, largest correlation of two {largest:.3f}",
    )


def _pairs_of_sizes(z: Floats, alpha: float) -> Finding:
    """Counts how often two steps are both large or both small, whatever their signs."""
    steps, width = z.shape
    signs = np.where(np.abs(z) > _MEDIAN, 1.0, -1.0)
    agreements = ((width + signs @ signs.T) / 2)[np.triu_indices(steps, 1)]
    probabilities = (
        [_of_count(int(n), width, 0.5) for n in (agreements.min(), agreements.max())]
        if steps > 1
        else []
    )
    probability = min([1.0, *(p * len(agreements) for p in probabilities)])
    return of_probability("noise: sizes independent between steps", probability, alpha)


def _lags(z: Floats, alpha: float) -> Finding:
    """Sums the products of all steps at a distance, which finds a small part in each step."""
    probabilities = [1.0]
    for lag in range(1, min(_LAGS, len(z) - 1) + 1):
        products = z[lag:] * z[:-lag]
        probabilities.append(
            _two_sided(float(products.sum()) / math.sqrt(products.size)) * _LAGS
        )
    return of_probability(
        f"noise: nothing left of the {_LAGS} steps before", min(probabilities), alpha
    )


def _weights(z: Floats, alpha: float) -> list[Finding]:
    """Compares neighbouring weights, and weights at half of the total distance."""
    width = z.shape[1]
    signs = np.where(np.abs(z) > _MEDIAN, 1, -1)
    shifts = sorted({s for s in (1, 2, width // 2, -(-width // 2)) if 0 < s < width})
    values, sizes = [1.0], [1.0]
    for shift in shifts:
        products = z[:, shift:] * z[:, :-shift]
        score = float(products.sum()) / math.sqrt(products.size)
        values.append(_two_sided(score) * len(shifts))
        agreements = int((signs[:, shift:] == signs[:, :-shift]).sum())
        sizes.append(_of_count(agreements, products.size, 0.5) * len(shifts))
    return [
        of_probability("noise: independent between weights", min(values), alpha),
        of_probability("noise: sizes independent between weights", min(sizes), alpha),
    ]


def _variables(z: Floats, blocks: Sequence[Block], alpha: float) -> Finding:
    """Correlates variables of equal size, which may have the same noise by mistake."""
    parts = [z[:, b.columns] for b in blocks]
    pairs = [(a, b) for a, b in itertools.combinations(parts, 2) if a.size == b.size][:100]
    probabilities = [1.0]
    for a, b in pairs:
        if a.size > 3:
            largest = abs(float(np.corrcoef(a.ravel(), b.ravel())[0, 1]))
            probabilities.append(_of_correlation(min(1.0, largest), a.size - 2) * len(pairs))
    return of_probability("noise: independent between variables", min(probabilities), alpha)


def _of_correlation(correlation: float, freedom: int) -> float:
    if correlation >= 1:
        return 0.0
    t = correlation * math.sqrt(freedom / (1 - correlation**2))
    return 2 * float(_stats().t.sf(t, freedom))


def _of_count(count: int, trials: int, probability: float) -> float:
    binom = _stats().binom
    tails = binom.cdf(count, trials, probability), binom.sf(count - 1, trials, probability)
    return min(1.0, 2 * float(min(tails)))


def _two_sided(score: float) -> float:
    return 2 * float(_stats().norm.sf(abs(score)))


def _stats() -> Any:
    from scipy import stats

    return stats
