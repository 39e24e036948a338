"""The cost of DP-SGD, and the noise for a budget, computed by Google's dp-accounting.

This file has no formula of privacy, and needs no TensorFlow.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

from tfdist.errors import ArgumentError
from tfdist.privacy.accounting.arguments import check_count, check_number
from tfdist.privacy.accounting.ledger import Ledger, Phase, dp_accounting

_LEAST_NOISE = 2.0**-5
_MOST_NOISE = 2.0**20
# With more phases than these, a factor that is some tenths of a percent too large is accepted.
_MOST_REFINED = 4
_REFINEMENTS = 3


def epsilon(
    *,
    sampling_probability: float,
    noise_multiplier: float,
    steps: int,
    delta: float,
    accountant: str = "pld",
    relation: str = "add_or_remove_one",
    capacity: int | None = None,
    num_rows: int | None = None,
) -> float:
    """Computes the epsilon of DP-SGD with Poisson sampling.

    Args:
        sampling_probability: The probability with which a step draws an example: the expected
            batch size over the number of examples.
        noise_multiplier: The noise's standard deviation over the clipping norm.
        steps: The number of updates of the weights.
        delta: Between 0 and 1, far below 1 / the number of examples.
        accountant: "pld" composes distributions of the privacy loss (Koskela et al.,
            "Computing tight differential privacy guarantees using FFT", AISTATS 2020), and
            is tight; "rdp" bounds by Rényi divergences (Mironov et al., "Rényi differential
            privacy of the sampled Gaussian mechanism", 2019), as most papers did.
        relation: How neighbouring data sets differ in one example: "add_or_remove_one",
            "replace_special" (by one that contributes nothing), or "replace_one" (by any
            other, which about doubles epsilon).
        capacity: The most examples of a step, or None if there is no limit. It needs
            `num_rows`.
        num_rows: The number of examples in the data.

    Returns:
        Epsilon. It is infinite without noise.

    Raises:
        ArgumentError: A value is out of its range, or the accountant does not support it.
        MissingPackageError: dp-accounting is not installed.

    Example:
        >>> import tfdist
        >>> spent = tfdist.privacy.epsilon(
        ...     sampling_probability=256 / 60000, noise_multiplier=1.1, steps=14100, delta=1e-5
        ... )
        >>> round(spent, 2)
        2.39
    """
    phase = Phase(sampling_probability, noise_multiplier, steps, capacity, num_rows)
    return Ledger().add(phase).epsilon(delta, accountant=accountant, relation=relation)


def noise_multiplier(
    *,
    target_epsilon: float,
    sampling_probability: float,
    steps: int,
    delta: float,
    accountant: str = "pld",
    relation: str = "add_or_remove_one",
    capacity: int | None = None,
    num_rows: int | None = None,
    spent: Ledger | None = None,
) -> float:
    """Finds the least noise with which steps stay within a budget.

    Args:
        target_epsilon: The largest epsilon of these steps together with `spent`.
        sampling_probability: As in `epsilon`.
        steps: As in `epsilon`.
        delta: As in `epsilon`.
        accountant: As in `epsilon`.
        relation: As in `epsilon`.
        capacity: As in `epsilon`.
        num_rows: As in `epsilon`.
        spent: The steps that were made on the same data before.

    Returns:
        The noise multiplier, within 0.1 % of the least one and not below 0.015. Its epsilon is
        never above the target.

    Raises:
        ArgumentError: A value is out of its range, or no noise is enough.
        MissingPackageError: dp-accounting is not installed.

    Example:
        >>> import tfdist
        >>> noise = tfdist.privacy.noise_multiplier(
        ...     target_epsilon=3.0, sampling_probability=0.01, steps=1000, delta=1e-5
        ... )
        >>> round(noise, 2)
        0.81
    """
    check_number("target_epsilon", target_epsilon, 0, open_ends=True)
    check_number("sampling_probability", sampling_probability, 0, 1)
    check_count("steps", steps, 1)
    return noise_for(
        [Phase(sampling_probability, 1.0, steps, capacity, num_rows)],
        target_epsilon,
        delta,
        accountant=accountant,
        relation=relation,
        spent=spent or Ledger(),
    )


def noise_for(
    phases: Sequence[Phase],
    target_epsilon: float,
    delta: float,
    *,
    accountant: str,
    relation: str,
    spent: Ledger,
) -> float:
    """Finds the least factor of the noise of steps that keeps them within a budget.

    Args:
        phases: The steps. Their least noise multiplier is 1, so that the factor is the least
            noise. All have the same capacity.
        target_epsilon: As in `noise_multiplier`.
        delta: As in `noise_multiplier`.
        accountant: As in `noise_multiplier`.
        relation: As in `noise_multiplier`.
        spent: As in `noise_multiplier`.

    Raises:
        ArgumentError: No noise is enough.
    """

    def cost(noise: float, capacity: int | None, *, coarse: bool) -> float:
        ledger = spent
        for phase in phases:
            multiplier = noise * phase.noise_multiplier
            ledger = ledger.add(replace(phase, noise_multiplier=multiplier, capacity=capacity))
        return ledger.epsilon(delta, accountant=accountant, relation=relation, coarse=coarse)

    def least_noise(capacity: int | None) -> float:
        # A coarse epsilon takes a tenth of the time, and is too large by an excess that hardly
        # depends on the noise. So the search is by coarse epsilons, for the target plus the
        # excess, and a few fine ones correct the excess.
        def above(target: float, noise: float) -> float:
            return cost(noise, capacity, coarse=True) - target

        noise = _least(functools.partial(above, target_epsilon), 1.0, 2.0)
        if len(phases) > _MOST_REFINED:
            return noise
        for _ in range(_REFINEMENTS):
            excess = above(cost(noise, capacity, coarse=False), noise)
            previous, target = noise, target_epsilon + excess
            noise = _least(functools.partial(above, target), noise, 1.01)
            if abs(noise - previous) <= 2e-4 * noise:
                break
        while cost(noise, capacity, coarse=False) > target_epsilon:
            noise *= 1 + 1e-4
        return noise

    spent_epsilon = spent.epsilon(delta, accountant=accountant, relation=relation)
    if spent_epsilon >= target_epsilon:
        raise ArgumentError(
            "`target_epsilon` must be above the epsilon of the steps before. Received: "
            f"target_epsilon={target_epsilon!r}, with {spent_epsilon:.4g} spent before, at "
            f"delta={delta!r}. Raise `target_epsilon`."
        )
    capacity = phases[0].capacity
    if capacity is not None:
        # Accounting for a capacity takes long, and a capacity that is rarely reached costs
        # almost nothing. So the noise without a capacity is tried first.
        noise = least_noise(None) * (1 + 1e-4)
        if cost(noise, capacity, coarse=False) <= target_epsilon:
            return noise
    return least_noise(capacity)


def _least(gap: Callable[[float], float], start: float, factor: float) -> float:
    """Finds the least noise whose gap is at most 0: brackets it by factors, then bisects."""
    high = low = start
    while gap(high) > 0:
        low, high = high, high * factor
        if high > _MOST_NOISE:
            raise ArgumentError(
                f"`target_epsilon` must be reachable with noise below {_MOST_NOISE:g}. "
                "Received: a `target_epsilon` that needs more noise. Raise it, or `delta`."
            )
    while low == high or gap(low) <= 0:
        if low < _LEAST_NOISE:
            return low
        low, high = low / factor, low
    from scipy import optimize  # dp-accounting brings it

    noise = float(optimize.brentq(gap, low, high, xtol=1e-4 * high, rtol=1e-4))
    while gap(noise) > 0:
        noise *= 1 + 1e-4
    return noise


def capacity(
    *, num_rows: int, sampling_probability: float, steps: int = 10**6, delta: float = 1e-6
) -> int:
    """Chooses a capacity of steps that costs almost no privacy.

    Pass the capacity to `epsilon`, which accounts for its exact cost.

    Args:
        num_rows: The number of examples in the data.
        sampling_probability: As in `epsilon`.
        steps: The number of updates of the weights, or more.
        delta: As in `epsilon`, or smaller.

    Returns:
        The least number that any of the steps exceeds with a probability of at most
        `delta` / 1000, but at most `num_rows`.

    Raises:
        ArgumentError: A value is out of its range.
        MissingPackageError: dp-accounting is not installed.

    Example:
        >>> import tfdist
        >>> tfdist.privacy.capacity(num_rows=60000, sampling_probability=256 / 60000)
        393
    """
    check_count("num_rows", num_rows, 1)
    check_count("steps", steps, 1)
    check_number("sampling_probability", sampling_probability, 0, 1)
    check_number("delta", delta, 0, 1, open_ends=True)
    dp_accounting()
    from scipy import stats  # dp-accounting brings it

    # A union bound over all steps.
    beyond = stats.binom.isf(delta / (1000 * steps), num_rows, sampling_probability)
    return max(1, int(beyond))
