"""Lower bounds of epsilon from guesses about the members of the training data."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfdist.errors import ArgumentError, MissingPackageError
from tfdist.privacy.accounting.arguments import check_count, check_number

_HALVINGS = 40


def epsilon_lower_bound(
    *,
    num_canaries: int,
    guesses: int,
    right: int,
    delta: float,
    confidence: float = 0.95,
) -> float:
    """Bounds epsilon from below by guesses about the canaries of one training run.

    A fair coin decided for each canary whether it was in the data. From the trained model it
    was guessed for some canaries whether they were in. If training is (epsilon,
    delta)-private, no method guesses right much more often than randomized response (Steinke,
    Nasr and Jagielski, "Privacy auditing with one (1) training run", NeurIPS 2023, theorem
    5.2; the computation is that of appendix D). An epsilon is refuted if, under it, so many
    right guesses have a probability of at most 1 - `confidence`. The largest refuted epsilon
    is returned.

    Args:
        num_canaries: The number of canaries for which a coin was thrown.
        guesses: The number of guesses, fixed before looking at the scores.
        right: The number of right guesses.
        delta: The delta of the tested guarantee, between 0 and 1.
        confidence: The probability with which the bound holds, over coins and training, above
            0 and below 1.

    Returns:
        A number of at least 0: under the relation "add_or_remove_one", the training cannot be
        (epsilon, delta)-private for a smaller epsilon. 0 refutes nothing.

    Raises:
        ArgumentError: A count or a probability is out of its range.
        MissingPackageError: SciPy is not installed.

    Example:
        >>> from tfdist.privacy import epsilon_lower_bound
        >>> bound = epsilon_lower_bound(num_canaries=1000, guesses=100, right=75, delta=1e-4)
        >>> round(bound, 3)  # the paper's own example
        0.673
    """
    check_number("confidence", confidence, 0, 1, open_ends=True)
    check_guesses(num_canaries, guesses, right)
    check_number("delta", delta, 0, 1)

    def refuted(epsilon: float) -> bool:
        p = p_value(
            num_canaries=num_canaries,
            guesses=guesses,
            right=right,
            epsilon=epsilon,
            delta=delta,
        )
        return p <= 1 - confidence

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def p_value(
    *, num_canaries: int, guesses: int, right: int, epsilon: float, delta: float
) -> float:
    """Bounds the probability of so many right guesses, if the training is private.

    Args:
        num_canaries: As in `epsilon_lower_bound`.
        guesses: As in `epsilon_lower_bound`.
        right: As in `epsilon_lower_bound`.
        epsilon: Of the guarantee that is tested.
        delta: Of the guarantee that is tested.

    Returns:
        Between 0 and 1.

    Raises:
        ArgumentError: As `epsilon_lower_bound`.
        MissingPackageError: As `epsilon_lower_bound`.
    """
    check_number("epsilon", epsilon, 0)
    check_guesses(num_canaries, guesses, right)
    check_number("delta", delta, 0, 1)
    if right == 0:
        return 1.0
    special = scipy_special()
    # The probability that a guess by randomized response is right.
    accuracy = 1 / (1 + math.exp(-epsilon))
    p = float(special.betainc(right, guesses - right + 1, accuracy))
    if delta > 0:
        fewer = np.arange(right - 1, -1, -1)
        probability = np.exp(
            special.gammaln(guesses + 1)
            - special.gammaln(fewer + 1)
            - special.gammaln(guesses - fewer + 1)
            + special.xlogy(fewer, accuracy)
            + special.xlogy(guesses - fewer, 1 / (1 + math.exp(epsilon)))
        )
        # At worst, the failure that delta allows turns wrong guesses into right ones, and it
        # may happen for each canary.
        worst = (np.cumsum(probability) / np.arange(1, right + 1)).max()
        p += 2 * num_canaries * delta * float(worst)
    return min(p, 1.0)


def clopper_pearson(
    successes: NDArray[np.int64], trials: int, confidence: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns intervals for probabilities, from independent trials.

    Clopper and Pearson, "The use of confidence or fiducial limits illustrated in the case of
    the binomial", Biometrika 1934.

    Args:
        successes: Each at most `trials`.
        trials: At least 1.
        confidence: Each end by itself is wrong with a probability of at most
            (1 - `confidence`) / 2.

    Returns:
        The lower and the upper ends, each of the shape of `successes`.

    Raises:
        MissingPackageError: SciPy is not installed.
    """
    special = scipy_special()
    tail = (1 - confidence) / 2
    failures = trials - successes
    low = special.betaincinv(np.maximum(successes, 1), failures + 1, tail)
    high = special.betaincinv(successes + 1, np.maximum(failures, 1), 1 - tail)
    return np.where(successes > 0, low, 0.0), np.where(failures > 0, high, 1.0)


def scipy_special() -> Any:
    """Imports SciPy's functions for audits.

    Raises:
        MissingPackageError: It is not installed.
    """
    try:
        from scipy import special
    except ImportError:
        raise MissingPackageError(
            "An audit needs SciPy. Received: an installation without it. "
            'Install it: pip install "tfdist[privacy]".'
        ) from None
    return special


def check_guesses(num_canaries: int, guesses: int, right: int) -> None:
    """Refuses impossible counts.

    Args:
        num_canaries: As in `epsilon_lower_bound`.
        guesses: As in `epsilon_lower_bound`.
        right: As in `epsilon_lower_bound`.

    Raises:
        ArgumentError: The counts are impossible.
    """
    check_count("num_canaries", num_canaries, 1)
    check_count("guesses", guesses, 0)
    check_count("right", right, 0)
    if not right <= guesses <= num_canaries:
        raise ArgumentError(
            "`right` must be at most `guesses`, and `guesses` at most `num_canaries`. "
            f"Received: right={right}, guesses={guesses}, num_canaries={num_canaries}. Pass "
            "the three counts of one audit."
        )
