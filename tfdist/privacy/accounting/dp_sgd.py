"""What DP-SGD costs, and how much noise a budget asks for: Google's dp-accounting answers.

No formula of privacy is written here, and nothing of this needs TensorFlow.
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
_FEW = 4  # different steps: of more, a factor that is some tenths of a percent large is enough
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
        sampling_probability: Of each example in each step: the expected batch size over
            the number of examples.
        noise_multiplier: The noise's standard deviation over the norm that gradients are
            clipped to.
        steps: Updates of the weights.
        delta: Between 0 and 1, far below 1 / the number of examples.
        accountant: "pld" composes distributions of the privacy loss (Koskela et al.,
            "Computing tight differential privacy guarantees using FFT", AISTATS 2020), and
            is tight; "rdp" bounds by Rényi divergences (Mironov et al., "Rényi differential
            privacy of the sampled Gaussian mechanism", 2019), as most papers did.
        relation: Which data sets shall look alike: with one example "add_or_remove_one",
            "replace_special" (by one that counts nothing), or "replace_one" (by any other;
            about twice the epsilon).
        capacity: The most examples a step takes, if there is a limit; needs `num_rows`.
        num_rows: Examples in the data.

    Returns:
        Epsilon; infinity without noise.

    Raises:
        ArgumentError: A value is out of its range, or the accountant cannot do it.
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
        target_epsilon: What the steps, and those spent before, may cost.
        sampling_probability: As in `epsilon`.
        steps: As in `epsilon`.
        delta: As in `epsilon`.
        accountant: As in `epsilon`.
        relation: As in `epsilon`.
        capacity: As in `epsilon`.
        num_rows: As in `epsilon`.
        spent: Steps that were made on the same data before.

    Returns:
        The noise multiplier, within 0.1 % of the least one, and not below 0.015. Its
        epsilon is never above the target.

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
    """Finds the least factor of their noise with which steps stay within a budget.

    Args:
        phases: The steps, the least of whose noise multipliers is 1: then the factor is the
            least noise. All have the same capacity.
        target_epsilon: As in `noise_multiplier`.
        delta: As in `noise_multiplier`.
        accountant: As in `noise_multiplier`.
        relation: As in `noise_multiplier`.
        spent: As in `noise_multiplier`.

    Raises:
        ArgumentError: No noise is enough.
    """
    before = spent

    def cost(noise: float, room: int | None, *, coarse: bool) -> float:
        ledger = before
        for phase in phases:
            multiplier = noise * phase.noise_multiplier
            ledger = ledger.add(replace(phase, noise_multiplier=multiplier, capacity=room))
        return ledger.epsilon(delta, accountant=accountant, relation=relation, coarse=coarse)

    def enough(room: int | None) -> float:
        # A coarse epsilon is a larger one, and costs a tenth. Its excess hardly depends on the
        # noise: found once, it says where the fine one meets the target.
        def above(wanted: float, noise: float) -> float:
            return cost(noise, room, coarse=True) - wanted

        noise = _least(functools.partial(above, target_epsilon), 1.0, 2.0)
        if len(phases) > _FEW:
            return noise
        for _ in range(_REFINEMENTS):
            excess = above(cost(noise, room, coarse=False), noise)
            previous, wanted = noise, target_epsilon + excess
            noise = _least(functools.partial(above, wanted), noise, 1.01)
            if abs(noise - previous) <= 2e-4 * noise:
                break
        while cost(noise, room, coarse=False) > target_epsilon:
            noise *= 1 + 1e-4
        return noise

    already = before.epsilon(delta, accountant=accountant, relation=relation)
    if already >= target_epsilon:
        raise ArgumentError(
            "`target_epsilon` must leave something for the steps to come. Received: "
            f"target_epsilon={target_epsilon!r}, with {already:.4g} spent before, at "
            f"delta={delta!r}. Raise it."
        )
    room = phases[0].capacity
    if room is not None:
        # A capacity that is never reached costs nothing, and its accounting takes long.
        found = enough(None) * (1 + 1e-4)
        if cost(found, room, coarse=False) <= target_epsilon:
            return found
    return enough(room)


def _least(gap: Callable[[float], float], start: float, factor: float) -> float:
    """Finds the least noise whose gap is not above 0, by factors from a start, then between."""
    high = low = start
    while gap(high) > 0:
        low, high = high, high * factor
        if high > _MOST_NOISE:
            raise ArgumentError(
                "`target_epsilon` must be large enough to be computed. Received a target that "
                f"noise of {_MOST_NOISE:g} does not reach. Raise it, or `delta`."
            )
    while low == high or gap(low) <= 0:
        if low < _LEAST_NOISE:
            return low
        low, high = low / factor, low
    from scipy import optimize  # dp-accounting brings it

    found = float(optimize.brentq(gap, low, high, xtol=1e-4 * high, rtol=1e-4))
    while gap(found) > 0:
        found *= 1 + 1e-4
    return found


def capacity(
    *, num_rows: int, sampling_probability: float, steps: int = 10**6, delta: float = 1e-6
) -> int:
    """Chooses how many examples a step must have room for so that truncation costs nothing.

    Whether it did cost anything is never taken from here: give the capacity to `epsilon`,
    which accounts for it.

    Args:
        num_rows: Examples in the data.
        sampling_probability: Of each of them in each step.
        steps: Updates of the weights, or more.
        delta: As in `epsilon`, or smaller.

    Returns:
        The least number that any of the steps exceeds with a probability of at most
        `delta` / 1000; at most `num_rows`.

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

    beyond = stats.binom.isf(delta / (1000 * steps), num_rows, sampling_probability)
    return max(1, int(beyond))
