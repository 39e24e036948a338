"""Statistical tests of draws by independent coins."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfdist.privacy.checking.report import Finding, of_probability

Bools = NDArray[np.bool_]
_LAGS = (1, 2, 3, 5)


def draw_facts(participation: Bools, probability: Any, alpha: float) -> list[Finding]:
    """Tests the participation of examples in steps.

    Args:
        participation: Whether a step drew an example, shape [steps, examples].
        probability: The expected probability of a draw, a number or of shape [examples].
        alpha: The probability of a false alarm of each test.

    Returns:
        At most 5 findings.
    """
    steps, examples = participation.shape
    probabilities = np.broadcast_to(np.asarray(probability, np.float64), [examples])
    rng = np.random.default_rng(1)  # breaks ties
    counts = participation.sum(0)
    facts = [
        _of_counts("draws: of each example", counts, steps, probabilities, rng, alpha),
        _extreme_count(counts, steps, probabilities, alpha),
    ]
    if probabilities.min() == probabilities.max() < 1:
        common_probability = float(probabilities[0])
        sizes = participation.sum(1)
        facts += [
            _of_counts(
                "draws: sizes of batches", sizes, examples, common_probability, rng, alpha
            ),
            _between_steps(participation, common_probability, alpha),
            _between_examples(participation, common_probability, alpha),
        ]
    return facts


def _of_counts(
    name: str, counts: Any, trials: int, probability: Any, rng: Any, alpha: float
) -> Finding:
    """Compares counts with a binomial distribution.

    The distribution function, with ties broken at random, maps binomial counts to uniform
    numbers between 0 and 1 (Brockwell, "Universal residuals", Statistics and Probability
    Letters 2007). The test finds counts that vary too much, and also counts that vary too
    little, such as those of a shuffle.
    """
    stats = _stats()
    below = stats.binom.cdf(counts - 1, trials, probability)
    at = stats.binom.pmf(counts, trials, probability)
    uniform = below + rng.random(len(counts)) * at
    p_value = stats.kstest(uniform, "uniform").pvalue
    detail = (
        f"{len(counts)} counts of {trials} coins, mean {float(np.mean(counts)):.4g}, expected "
        f"{float(np.mean(probability)) * trials:.4g}"
    )
    return of_probability(f"{name}, binomial", float(p_value), alpha, detail)


def _extreme_count(counts: Any, steps: int, probabilities: Any, alpha: float) -> Finding:
    """Finds a single example that is drawn too often or too rarely."""
    stats = _stats()
    tails = np.minimum(
        stats.binom.cdf(counts, steps, probabilities),
        stats.binom.sf(counts - 1, steps, probabilities),
    )
    worst = int(tails.argmin())
    detail = f"example {worst} in {int(counts[worst])} of {steps} steps"
    return of_probability(
        "draws: the least probable", 2 * len(counts) * float(tails[worst]), alpha, detail
    )


def _between_steps(participation: Bools, probability: float, alpha: float) -> Finding:
    """Counts examples in both of two steps: none with a shuffle, all with repeated draws."""
    steps, examples = participation.shape
    as_floats = participation.astype(np.float32)
    shared = (as_floats @ as_floats.T)[np.triu_indices(steps, 1)]
    probabilities = [1.0]
    if len(shared):
        probabilities += [
            _of_count(int(n), examples, probability**2) * 2 * len(shared)
            for n in (shared.min(), shared.max())
        ]
    lags = [lag for lag in {*_LAGS, steps // 2} if 0 < lag <= steps // 2]
    for lag in lags:
        # No step is in two pairs, so the pairs are independent.
        first = np.array([s for s in range(steps - lag) if s // lag % 2 == 0])
        count = int((participation[first] & participation[first + lag]).sum())
        trials = len(first) * examples
        probabilities.append(_of_count(count, trials, probability**2) * 2 * len(lags))
    detail = f"{steps} steps, all pairs, and together those {_LAGS} apart"
    return of_probability("draws: independent between steps", min(probabilities), alpha, detail)


def _between_examples(participation: Bools, probability: float, alpha: float) -> Finding:
    """Counts how often neighbouring examples are drawn together."""
    examples = participation.shape[1]
    probabilities = [1.0]
    for lag in {1, examples // 2} - {0}:
        first = np.array([i for i in range(examples - lag) if i // lag % 2 == 0])
        count = int((participation[:, first] & participation[:, first + lag]).sum())
        probabilities.append(
            2 * _of_count(count, len(first) * len(participation), probability**2)
        )
    return of_probability("draws: independent between examples", min(probabilities), alpha)


def _of_count(count: int, trials: int, probability: float) -> float:
    binom = _stats().binom
    tails = binom.cdf(count, trials, probability), binom.sf(count - 1, trials, probability)
    return min(1.0, 2 * float(min(tails)))


def _stats() -> Any:
    from scipy import stats

    return stats
