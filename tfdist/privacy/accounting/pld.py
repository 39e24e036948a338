"""Composes distributions of the privacy loss, with a bound for what floats make wrong.

dp-accounting gives the distribution of a single step; its composition by FFT has an error of
about 1e-16 times the steps, whatever the probability, which may be more than `delta`. Here the
distributions are tilted first, so that the losses around epsilon are the likely ones: then the
error is one of the probability that is asked for (Wilson and Keich, "Accurate pairwise
convolutions of non-negative vectors via FFT", Computational Statistics 2016), and is added.

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
_LOG_ELSEWHERE = -35.0  # tilted losses that are taken for larger or smaller ones of the window


@dataclass(frozen=True, eq=False)
class Losses:
    """The distribution of the privacy loss of a step, on a grid, rounded to the safe side.

    Args:
        probabilities: Of losses that are whole multiples of the grid's step, from `first` on.
        first: The first multiple.
        infinite: Probability of an infinite loss.
        times: How many such steps there are.
    """

    probabilities: Array
    first: int
    infinite: float
    times: int

    def log_moments(self, interval: float, tilt: float) -> tuple[Array, float]:
        """Gives the exponents of tilted probabilities, and their largest."""
        with np.errstate(divide="ignore"):
            losses = interval * (self.first + np.arange(len(self.probabilities)))
            exponents = np.log(self.probabilities) + tilt * losses
        return exponents, float(exponents.max())

    def log_moment(self, interval: float, tilt: float) -> float:
        """Gives the logarithm of the mean of exp(tilt * loss), of one step."""
        exponents, largest = self.log_moments(interval, tilt)
        return largest + math.log(np.exp(exponents - largest).sum())


class _Tilt(NamedTuple):
    """A tilt, what it makes of a composition, and where losses are likely then."""

    value: float
    log_moment: float
    mean: float
    deviation: float


class LossDistributions:
    """Many steps together.

    Args:
        losses: Of all kinds of steps, on the same grid.
        interval: The grid's step.
    """

    def __init__(self, losses: Sequence[Losses], interval: float) -> None:
        self._losses = losses
        self._interval = interval

    def epsilon(self, delta: float) -> float:
        """Gives the smallest epsilon that is known to be enough; infinity if there is none.

        Args:
            delta: Between 0 and 1.
        """
        infinite = -math.expm1(sum(p.times * math.log1p(-p.infinite) for p in self._losses))
        left = delta - infinite * (1 + 1e-9)
        if left <= 0:
            return math.inf
        tilt = self._best_tilt(left)
        # Chernoff's bound: losses above it have a probability of no more than what is left.
        bound = (tilt.log_moment - math.log(left)) / tilt.value
        bound = bound + 1e-9 * (1 + abs(bound) + abs(tilt.log_moment) / tilt.value)
        return max(0.0, min(bound, self._by_fft(tilt, left)))

    def _log_moment(self, tilt: float) -> float:
        return sum(p.times * p.log_moment(self._interval, tilt) for p in self._losses)

    def _best_tilt(self, delta: float) -> _Tilt:
        """Finds the tilt with the best of Chernoff's bounds, roughly: any is right."""
        log_delta = math.log(delta)
        found = optimize.minimize_scalar(
            lambda log: (self._log_moment(math.exp(log)) - log_delta) / math.exp(log),
            bounds=(math.log(1e-2), math.log(1e6)),
            method="bounded",
            options={"xatol": 0.03, "maxiter": 25},
        )
        tilt = math.exp(found.x)
        moment = mean = variance = 0.0
        for part in self._losses:
            exponents, largest = part.log_moments(self._interval, tilt)
            weights = np.exp(exponents - largest)
            total = weights.sum()
            losses = self._interval * (part.first + np.arange(len(weights)))
            of_one = float(weights @ losses / total)
            mean += part.times * of_one
            variance += part.times * float(weights @ (losses - of_one) ** 2 / total)
            moment += part.times * (largest + math.log(total))
        return _Tilt(tilt, moment, mean, max(math.sqrt(variance), self._interval))

    def _window(self, tilt: _Tilt, delta: float) -> tuple[int, int, float]:
        """Chooses the losses to look at: their first and last, and log P(loss above them)."""
        low = float(sum(p.times * p.first for p in self._losses))
        high = low + sum(p.times * (len(p.probabilities) - 1) for p in self._losses)
        first, last, log_above = low, high, -math.inf
        wanted = math.log(delta) + _LOG_LEFT_OUT
        for deviations in (0.5, 1.0, 2.0, 4.0, 8.0):
            more = tilt.value + deviations / tilt.deviation
            moment = self._log_moment(more)
            # By Chernoff's bounds, of the losses themselves and of the tilted ones.
            top = (moment - wanted) / more
            tilted = (moment - tilt.log_moment - _LOG_ELSEWHERE) / (more - tilt.value)
            top = math.ceil(max(top, tilted) / self._interval) + 1
            if top < last:
                last, log_above = top, moment - more * top * self._interval
            less = tilt.value - deviations / tilt.deviation
            moment = tilt.log_moment - self._log_moment(less)
            bottom = (moment + _LOG_ELSEWHERE) / (tilt.value - less) / self._interval
            first = max(first, math.floor(bottom))
        return int(min(first, last)), int(last), log_above

    def _by_fft(self, tilt: _Tilt, delta: float) -> float:
        first, last, log_above = self._window(tilt, delta)
        above = math.exp(log_above) * (1 + 1e-6)
        tilted = self._convolved(tilt.value, last - first + 1)
        size = len(tilted.probabilities)
        # A circular convolution knows places only up to the size; those of the window are it.
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
            """Gives the probability of these losses and larger ones, by both data sets."""
            larger = by_one[begin:]
            return float(larger.sum()), float(larger @ falling[: len(larger)])

        def too_little(begin: int) -> bool:
            """Tells whether an epsilon of this loss is not known to be enough."""
            one, other = parts(begin)
            return above + margin * max(0.0, one - other) + 1e-12 * one > delta

        low, high = 0, size - 1
        if too_little(high):
            return math.inf
        if not too_little(low):
            return float(losses[low])
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if too_little(middle) else (low, middle)
        # Between two losses the same ones are larger, and delta falls as exp(epsilon) grows.
        one, other = parts(high)
        wanted = one - (delta - above - 1e-12 * one) / margin
        if wanted <= 0 or other <= 0:
            return float(losses[low])
        between = float(losses[high]) + math.log(wanted / other)
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
        found = fft.irfft(power, size)
        # Of each number: the errors of all frequencies, and those of the way back.
        error = 2 * float((np.exp(log_bound) * relative).sum()) / size
        return _Convolved(np.maximum(found, 0) + error, log_scale, of_weights)


class _Convolved(NamedTuple):
    """A tilted composition, on a circle.

    Attributes:
        probabilities: Bounded from above, but for `relative`.
        log_scale: They were multiplied by exp(tilt * loss - log_scale).
        relative: How much too small each may be, as a logarithm.
    """

    probabilities: Array
    log_scale: float
    relative: float


def _folded(weights: Array, size: int) -> Array:
    """Adds up what falls on the same place of a circle."""
    padded = np.zeros(-(-len(weights) // size) * size)
    padded[: len(weights)] = weights
    folded: Array = padded.reshape(-1, size).sum(0)
    return folded
