"""Composes distributions of the privacy loss, with a bound of rounding errors.

dp-accounting computes the distribution of a single step. Its composition by FFT has an absolute
error of about 1e-16 times the steps, which may be larger than `delta`. Here the distributions
are tilted first, so that losses around epsilon are likely. The error is then relative to the
wanted probability (Wilson and Keich, "Accurate pairwise convolutions of non-negative vectors
via FFT", Computational Statistics 2016), and is added to it.

Needs no TensorFlow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import fft, optimize

Array = NDArray[np.float64]
_UNIT = 2.0**-53
_LOG_LEFT_OUT = -18.0  # losses above the window have at most e^-18 of delta, which is added
_LOG_ELSEWHERE = -35.0  # tilted losses outside of the window, which wrap around in the FFT


@dataclass(frozen=True, eq=False)
class Losses:
    """The distribution of the privacy loss of a step, on a grid, rounded to the safe side.

    Args:
        probabilities: The probabilities of losses that are whole multiples of the grid's step,
            beginning with `first`.
        first: The first multiple.
        infinite: The probability of an infinite loss.
        times: The number of steps with this distribution.
    """

    probabilities: Array
    first: int
    infinite: float
    times: int

    def log_moments(self, interval: float, tilt: float) -> tuple[Array, float]:
        """Returns the exponents of tilted probabilities, and their largest."""
        with np.errstate(divide="ignore"):
            losses = interval * (self.first + np.arange(len(self.probabilities)))
            exponents = np.log(self.probabilities) + tilt * losses
        return exponents, float(exponents.max())

    def log_moment(self, interval: float, tilt: float) -> float:
        """Returns the logarithm of the mean of exp(tilt * loss), of one step."""
        exponents, largest = self.log_moments(interval, tilt)
        return largest + math.log(np.exp(exponents - largest).sum())


class _Tilt(NamedTuple):
    """A tilt, with the log moment, the mean and the deviation of the tilted composition."""

    value: float
    log_moment: float
    mean: float
    deviation: float


class LossDistributions:
    """The composition of many steps.

    Args:
        losses: The distributions of all kinds of steps, on the same grid.
        interval: The grid's step.
    """

    def __init__(self, losses: Sequence[Losses], interval: float) -> None:
        self._losses = losses
        self._interval = interval

    def epsilon(self, delta: float) -> float:
        """Returns the smallest epsilon that is proven for `delta`, possibly infinite.

        Args:
            delta: Between 0 and 1.
        """
        infinite = -math.expm1(sum(p.times * math.log1p(-p.infinite) for p in self._losses))
        finite_delta = delta - infinite * (1 + 1e-9)
        if finite_delta <= 0:
            return math.inf
        tilt = self._best_tilt(finite_delta)
        # Chernoff's bound: larger losses have a probability of at most `finite_delta`. Where
        # the FFT is too coarse, this bound is the smaller one.
        bound = (tilt.log_moment - math.log(finite_delta)) / tilt.value
        bound = bound + 1e-9 * (1 + abs(bound) + abs(tilt.log_moment) / tilt.value)
        return max(0.0, min(bound, self._by_fft(tilt, finite_delta)))

    def _log_moment(self, tilt: float) -> float:
        return sum(p.times * p.log_moment(self._interval, tilt) for p in self._losses)

    def _best_tilt(self, delta: float) -> _Tilt:
        """Finds the tilt with nearly the best Chernoff bound. The result holds for any tilt."""
        log_delta = math.log(delta)
        minimum = optimize.minimize_scalar(
            lambda log: (self._log_moment(math.exp(log)) - log_delta) / math.exp(log),
            bounds=(math.log(1e-2), math.log(1e6)),
            method="bounded",
            options={"xatol": 0.03, "maxiter": 25},
        )
        tilt = math.exp(minimum.x)
        moment = mean = variance = 0.0
        for part in self._losses:
            exponents, largest = part.log_moments(self._interval, tilt)
            weights = np.exp(exponents - largest)
            total = weights.sum()
            losses = self._interval * (part.first + np.arange(len(weights)))
            step_mean = float(weights @ losses / total)
            mean += part.times * step_mean
            variance += part.times * float(weights @ (losses - step_mean) ** 2 / total)
            moment += part.times * (largest + math.log(total))
        return _Tilt(tilt, moment, mean, max(math.sqrt(variance), self._interval))

    def _window(self, tilt: _Tilt, delta: float) -> tuple[int, int, float]:
        """Chooses a window of losses: the first, the last, and log P(loss above them)."""
        low = float(sum(p.times * p.first for p in self._losses))
        high = low + sum(p.times * (len(p.probabilities) - 1) for p in self._losses)
        first, last, log_above = low, high, -math.inf
        log_wanted = math.log(delta) + _LOG_LEFT_OUT
        for deviations in (0.5, 1.0, 2.0, 4.0, 8.0):
            upper_tilt = tilt.value + deviations / tilt.deviation
            moment = self._log_moment(upper_tilt)
            # Chernoff's bounds of the losses, and of the tilted losses.
            top = (moment - log_wanted) / upper_tilt
            tilted = (moment - tilt.log_moment - _LOG_ELSEWHERE) / (upper_tilt - tilt.value)
            top = math.ceil(max(top, tilted) / self._interval) + 1
            if top < last:
                last, log_above = top, moment - upper_tilt * top * self._interval
            lower_tilt = tilt.value - deviations / tilt.deviation
            moment = tilt.log_moment - self._log_moment(lower_tilt)
            bottom = (moment + _LOG_ELSEWHERE) / (tilt.value - lower_tilt) / self._interval
            first = max(first, math.floor(bottom))
        return int(min(first, last)), int(last), log_above

    def _by_fft(self, tilt: _Tilt, delta: float) -> float:
        first, last, log_above = self._window(tilt, delta)
        above = math.exp(log_above) * (1 + 1e-6)
        tilted = self._convolved(tilt.value, last - first + 1)
        size = len(tilted.probabilities)
        # The places of a circular convolution are modulo its size. The window is extended to
        # this size, so each place belongs to one of its losses.
        start = sum(p.times * p.first for p in self._losses)
        places = np.roll(tilted.probabilities, (start - first) % size)
        losses = self._interval * (first + np.arange(size))
        exponents = tilted.log_scale - tilt.value * losses
        worst = tilted.relative + 8 * _UNIT * (
            abs(tilted.log_scale) + tilt.value * abs(losses).max()
        )
        margin = (1 + 1e-9) * math.exp(worst)

        with np.errstate(over="ignore"):
            by_one = np.exp(exponents) * places
        falling = np.exp(losses[0] - losses)

        def parts(begin: int) -> tuple[float, float]:
            """Returns the probability of these losses and larger ones, by both data sets."""
            larger = by_one[begin:]
            return float(larger.sum()), float(larger @ falling[: len(larger)])

        def too_little(begin: int) -> bool:
            """Returns whether an epsilon of this loss is not known to be enough."""
            by_first, by_second = parts(begin)
            return above + margin * max(0.0, by_first - by_second) + 1e-12 * by_first > delta

        low, high = 0, size - 1
        if too_little(high):
            return math.inf
        if not too_little(low):
            return float(losses[low])
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if too_little(middle) else (low, middle)
        # For epsilons between two losses of the grid, the same losses are larger, and delta is
        # linear in exp(epsilon). So the exact epsilon follows by interpolation.
        by_first, by_second = parts(high)
        needed_probability = by_first - (delta - above - 1e-12 * by_first) / margin
        if needed_probability <= 0 or by_second <= 0:
            return float(losses[low])
        between = float(losses[high]) + math.log(needed_probability / by_second)
        return min(max(between + 1e-12, float(losses[low])), float(losses[high]))

    def _convolved(self, tilt: float, least: int) -> _Convolved:
        size = fft.next_fast_len(least, real=True)
        transform_error = 16 * math.log2(size + 2) * _UNIT
        log_power = np.zeros(size // 2 + 1, complex)
        log_bound = np.zeros(size // 2 + 1)
        relative = np.full(size // 2 + 1, transform_error)
        log_scale = of_weights = 0.0
        for part in self._losses:
            exponents, largest = part.log_moments(self._interval, tilt)
            log_moment = largest + math.log(np.exp(exponents - largest).sum())
            weights = np.exp(exponents - log_moment)
            spectrum = fft.rfft(_folded(weights, size))
            bound = np.abs(spectrum) + transform_error
            with np.errstate(divide="ignore"):
                log_power += part.times * np.log(spectrum)
            log_bound += part.times * np.log(bound)
            relative += part.times * (
                transform_error / bound + 8 * _UNIT * (4 + np.abs(np.log(bound)))
            )
            log_scale += part.times * log_moment
            reach = tilt * self._interval * max(abs(part.first), abs(part.first + len(weights)))
            of_weights += part.times * 8 * _UNIT * (2 + reach + abs(log_moment))
        power = np.where(np.isfinite(log_power), np.exp(log_power), 0)
        inverse = fft.irfft(power, size)
        # The error of each number is at most the sum of the errors of all frequencies, of which
        # `rfft` has half. `relative` begins with the error of the inverse transform.
        error = 2 * float((np.exp(log_bound) * relative).sum()) / size
        return _Convolved(np.maximum(inverse, 0) + error, log_scale, of_weights)


class _Convolved(NamedTuple):
    """A tilted composition, on a circle.

    Attributes:
        probabilities: Upper bounds of the tilted probabilities, up to `relative`.
        log_scale: Probabilities were multiplied by exp(tilt * loss - log_scale).
        relative: A bound of their relative error, as a logarithm.
    """

    probabilities: Array
    log_scale: float
    relative: float


def _folded(weights: Array, size: int) -> Array:
    """Adds up numbers at the same place of a circle."""
    padded = np.zeros(-(-len(weights) // size) * size)
    padded[: len(weights)] = weights
    folded: Array = padded.reshape(-1, size).sum(0)
    return folded
