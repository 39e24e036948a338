"""Sums with noise, rounded to whole multiples of a unit that does not depend on the data.

Floats are not real numbers: which lowest bits a sum of a value and of noise can have depends on
the value, and who sees them can tell data sets apart for sure (Mironov, "On significance of the
least significant bits for differential privacy", CCS 2012). So noise is added in float64 and
the sum is rounded to a coarse grid before anything reads it; see docs/decisions/0015.
"""

from __future__ import annotations

import math
from typing import Any

import tensorflow as tf

from tfdist.errors import ArgumentError
from tfdist.privacy.mechanism.normals import is_worth_compiling

Tensor = Any
_FINENESS = 6  # steps of the grid in a standard deviation: 2^6; it adds 2e-5 to the variance
_EXACT = 2.0**24  # whole numbers up to this one, and their sums, are exact in float32


class Rounding:
    """Turns replicas' noisy sums into whole numbers, whose sum over replicas is exact.

    With one replica a number is a function of the noisy sum, so it costs no privacy. With R
    replicas, each with noise of deviation s / sqrt(R), the sum of their numbers is distributed
    as if the whole sum with noise of deviation s were rounded at random, by a B-spline of R
    boxes: so it costs none either, but for errors of the order of exp(-(pi s)^2 / R), s in
    steps of the grid.

    Args:
        noise: Standard deviation of the whole noise, in units of what one example can change.
        most: What the absolute sum of all examples is practically never above, in that unit.
        replicas: How many add noise of their own.

    Attributes:
        step: The grid's step, in the unit of `noise`.
        deviation: Of what rounding adds, in the same unit.

    Raises:
        ArgumentError: There is too little noise for so many replicas.
    """

    def __init__(self, noise: float, most: float, replicas: int) -> None:
        room = _EXACT / (most / noise + 10 * math.sqrt(replicas))
        least = 4 * math.sqrt(replicas)
        if replicas > 1 and room < least:
            raise ArgumentError(
                "`noise_multiplier` must be large enough for sums over replicas to be exact. "
                f"Received: noise of {noise:g} on {replicas} replicas, with sums of up to "
                f"{most:g} norms. Use more noise, smaller batches, or strategy='single'."
            )
        steps = max(_FINENESS, math.ceil(math.log2(least)))
        self._steps = 2.0 ** min(steps, math.floor(math.log2(room)))
        self._noise = self._steps / math.sqrt(replicas)
        self._limit = float(_EXACT // replicas)
        self.step = noise / self._steps
        self.deviation = self.step * math.sqrt(replicas / 12)

    def counts(self, value: Tensor, drawn: Tensor, unit: Any) -> Tensor:
        """Adds noise to a replica's sum, and rounds it.

        Args:
            value: The sum, float32, a vector or a scalar.
            drawn: Normal numbers of variance 1, float64, as many or more.
            unit: What one example can change `value` by.

        Returns:
            Whole numbers, float32, to be summed over replicas; times `unit` and `step` they
            are the noisy sum.
        """
        scale = 1 / (tf.cast(unit, tf.float64) * self.step)
        noise, limit = tf.constant(self._noise, tf.float64), tf.constant(self._limit)
        value = tf.convert_to_tensor(value, tf.float32)
        is_large = is_worth_compiling(value.shape.num_elements() or 0)
        return (_compiled if is_large else _rounded)(value, drawn, scale, noise, limit)


def _rounded(
    value: Tensor, drawn: Tensor, scale: Tensor, noise: Tensor, limit: Tensor
) -> Tensor:
    if value.shape.rank:
        drawn = drawn[: value.shape[0]]
    noisy = tf.cast(value, tf.float64) * scale + drawn * noise
    return tf.clip_by_value(tf.cast(tf.round(noisy), tf.float32), -limit, limit)


# One loop, rather than eight through all numbers.
_compiled = tf.function(_rounded, autograph=False, jit_compile=True)
