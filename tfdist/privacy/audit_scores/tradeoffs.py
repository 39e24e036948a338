"""Tests a whole trade-off curve by guesses about canaries, not one epsilon and delta.

A mechanism is f-private if no test of membership has both errors below the curve f (Dong, Roth
and Su, "Gaussian differential privacy", JRSS B 2022). One epsilon and delta are a single
tangent of the curve, which is close to the curve only near the point where it touches. So a
test of the curve itself refutes more (Mahloujifar, Melis and Chaudhuri, "Auditing
f-differential privacy in one run", ICML 2025).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from tfdist.privacy.accounting.arguments import check_number
from tfdist.privacy.accounting.ledger import Ledger, dp_accounting
from tfdist.privacy.audit_scores.bounds import check_guesses, scipy_special

Floats = NDArray[np.float64]
Curve = Callable[[Floats], Floats]
"""Maps a probability y under one data set to the least x under the other: y <= 1 - f(x)."""

_AT_ONCE = 32
_ROUNDS = 4
_MOST_MU = 64.0
_INTERVAL, _POINTS, _MOST_EPSILON, _LEAST_DELTA = 1e-3, 120, 100.0, 1e-9


def is_refuted(
    curve: Curve, *, num_canaries: int, guesses: int, right: int, error: Floats
) -> NDArray[np.bool_]:
    """Returns whether the curve makes so many right guesses less probable than an error.

    Let p[t] be the probability of t right guesses among c guesses about m canaries. For a
    private mechanism and every j, sum over t >= j of (t / m) p[t] <= 1 - f(sum over t >= j - 1
    of ((c - t) / m) p[t]): flipping the coin of one canary turns a right guess about it into a
    wrong one, and does not change guesses about others (Mahloujifar et al., theorem 9). If
    `right` or more guesses are right with probability `error`, the least possible
    probabilities of fewer right guesses follow from the top down. If all of them together are
    above 1, there is no such mechanism.

    Args:
        curve: A function of arrays, element by element. It must never be above the true curve.
        num_canaries: The number of canaries, m.
        guesses: The number of guesses, c, fixed before looking at the scores.
        right: The number of right guesses.
        error: Probabilities of any shape. Each is tested separately.
    """
    total = guesses / num_canaries
    least_right = error * right / num_canaries
    least_wrong = error * (guesses - right) / num_canaries
    for below in range(right - 1, -1, -1):
        raised_wrong = np.maximum(least_wrong, curve(np.minimum(least_right, 1.0)))
        least_right = least_right + below / (guesses - below) * (raised_wrong - least_wrong)
        least_wrong = raised_wrong
    exceeds_one: NDArray[np.bool_] = least_right + least_wrong > total * (1 + 1e-12)
    return exceeds_one


def gaussian_lower_bound(
    *, num_canaries: int, guesses: int, right: int, confidence: float = 0.95
) -> float:
    """Bounds from below how Gaussian a training is: the mu of mu-GDP.

    Args:
        num_canaries: The number of canaries for which a coin was thrown.
        guesses: The number of guesses, fixed before looking at the scores.
        right: The number of right guesses.
        confidence: The probability with which the bound holds, above 0 and below 1.

    Returns:
        A number of at least 0: the training cannot be mu-GDP for a smaller mu. The mu of a
        Gaussian mechanism is sensitivity / standard deviation. If the curve of the training is
        not that of a Gaussian mechanism, it does not bound epsilon.

    Raises:
        ArgumentError: A count or a probability is out of its range.
        MissingPackageError: SciPy is not installed.

    Example:
        >>> from tfdist.privacy.audit_scores.tradeoffs import gaussian_lower_bound
        >>> round(gaussian_lower_bound(num_canaries=1000, guesses=100, right=75), 2)
        0.27
    """
    check_number("confidence", confidence, 0, 1, open_ends=True)
    check_guesses(num_canaries, guesses, right)
    if right == 0:
        return 0.0
    special = scipy_special()

    def refuted(mu: Floats) -> NDArray[np.bool_]:
        def curve(y: Floats) -> Floats:
            moved: Floats = special.ndtr(special.ndtri(y) - mu)
            return moved

        return is_refuted(
            curve,
            num_canaries=num_canaries,
            guesses=guesses,
            right=right,
            error=np.full(mu.shape, 1 - confidence),
        )

    low, high = 0.0, _MOST_MU
    if not refuted(np.array([low]))[0]:
        return 0.0
    for _ in range(_ROUNDS):
        tried = np.linspace(low, high, _AT_ONCE)
        first = int(refuted(tried).argmin())  # the first mu that is not refuted
        if first == 0:
            return high
        low, high = float(tried[first - 1]), float(tried[first])
    return low


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Returns the epsilon of a Gaussian mechanism.

    Balle and Wang, "Improving the Gaussian mechanism for differential privacy", ICML 2018,
    theorem 8.

    Args:
        mu: Sensitivity / standard deviation.
        delta: Above 0 and below 1.

    Example:
        >>> round(gaussian_epsilon(1.0, 1e-5), 2)
        4.38
    """
    from scipy import optimize, special

    if mu == 0:
        return 0.0

    def gap(epsilon: float) -> float:
        first = special.ndtr(mu / 2 - epsilon / mu)
        second = epsilon + special.log_ndtr(-mu / 2 - epsilon / mu)
        return float(first - math.exp(second)) - delta

    if gap(0.0) <= 0:
        return 0.0
    return float(optimize.brentq(gap, 0.0, mu * (mu / 2 + 40), xtol=1e-12))


def curve_of(epsilons: Sequence[float], deltas: Sequence[float]) -> Curve:
    """Returns a curve from some (epsilon, delta) of a mechanism.

    Args:
        epsilons: Numbers of at least 0.
        deltas: The mechanism's delta at each epsilon, or a larger one.
    """
    # Each pair gives two lines below the curve: y <= delta + e^epsilon x, and the same for the
    # complements of both events.
    lines = [(0.0, 0.0)]
    for epsilon, delta in zip(epsilons, deltas, strict=True):
        lines.append((math.exp(-epsilon), -delta * math.exp(-epsilon)))
        lines.append((math.exp(epsilon), 1 - delta - math.exp(epsilon)))
    slopes, offsets, begins = _envelope(lines)

    def curve(y: Floats) -> Floats:
        line = np.searchsorted(begins, y, "right")
        values: Floats = np.maximum(0.0, slopes[line] * y + offsets[line])
        return values

    return curve


def _envelope(lines: Sequence[tuple[float, float]]) -> tuple[Floats, Floats, Floats]:
    """Returns the upper envelope of lines, from left to right, and where each line begins."""
    envelope: list[tuple[float, float]] = []
    begins: list[float] = []
    for slope, offset in sorted(lines):
        while envelope:
            gain = slope - envelope[-1][0]
            cross = (envelope[-1][1] - offset) / gain if gain > 0 else -math.inf
            if begins and cross <= begins[-1]:
                envelope.pop()
                begins.pop()
            elif gain <= 0:  # parallel, and not below
                envelope.pop()
                if begins:
                    begins.pop()
            else:
                begins.append(cross)
                break
        envelope.append((slope, offset))
    coefficients = np.array(envelope)
    return coefficients[:, 0], coefficients[:, 1], np.array(begins)


def curve_of_ledger(ledger: Ledger, relation: str = "add_or_remove_one") -> Curve:
    """Returns the curve of all steps of a ledger, by privacy loss distributions.

    Args:
        ledger: The steps.
        relation: As in `tfdist.privacy.epsilon`.

    Raises:
        ArgumentError: The steps do not compose.
        MissingPackageError: dp-accounting is not installed.
    """
    ledger.check_unit()
    accounting = dp_accounting()
    epsilons = [0.0, *np.geomspace(1e-3, _MOST_EPSILON, _POINTS)]
    # The accountant's transforms are not exact below `_LEAST_DELTA`.
    deltas = [_LEAST_DELTA] * len(epsilons)
    # If clients made steps of their own, an example took part in those of one of them.
    for of_examples in ledger.dearest():
        phases = [phase for phase in of_examples.mechanisms if phase.sampling_probability]
        if any(phase.noise_multiplier == 0 for phase in phases):
            return curve_of([0.0], [1.0])  # without noise, nothing is refuted
        accountant = accounting.pld.PLDAccountant(
            accounting.NeighboringRelation[relation.upper()], _INTERVAL
        )
        for phase in phases:
            accountant.compose(phase.event())
        found = map(accountant.get_delta, epsilons)
        deltas = [max(a, b) for a, b in zip(deltas, found, strict=True)]
    return curve_of(epsilons, deltas)


def p_value_of(curve: Curve, *, num_canaries: int, guesses: int, right: int) -> float:
    """Bounds the probability of so many right guesses, if the training has a curve.

    Args:
        curve: As in `is_refuted`.
        num_canaries: As in `is_refuted`.
        guesses: As in `is_refuted`.
        right: As in `is_refuted`.

    Returns:
        Between 1e-12 and 1.
    """
    if right == 0:
        return 1.0
    tried = np.concatenate([10.0 ** np.linspace(-12, -1, 111), np.linspace(0.1, 1, 91)[1:]])
    refuted = is_refuted(
        curve, num_canaries=num_canaries, guesses=guesses, right=right, error=tried
    )
    # If an error is refuted, the probability is below it, and larger errors are refuted too.
    return float(tried[refuted.argmax()]) if refuted.any() else 1.0
