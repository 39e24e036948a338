"""Noisy sums, rounded to whole multiples of a unit that does not depend on the data.

Floats are not real numbers: the lowest bits that a value plus noise can have depend on the
value, so whoever sees these bits can tell some data sets apart with certainty (Mironov, "On
significance of the least significant bits for differential privacy", CCS 2012). So noise is
added in float64, and the sum is rounded to a coarse grid before anything reads it. See
docs/decisions/0015.
"""

from __future__ import annotations

import math
from typing import Any

import tensorflow as tf

from tfdist.errors import ArgumentError
from tfdist.privacy.mechanism.normals import is_worth_compiling

Tensor = Any
_FINENESS = 6  # 2^6 steps of the grid in a standard deviation: the variance grows by 2e-5
_EXACT = 2.0**24  # up to here, whole numbers and their sums are exact in float32


class Rounding:
    """Rounds replicas' noisy sums to whole numbers, whose sum over replicas is exact.

    With one replica the rounded number is a function of the noisy sum, so rounding costs no
    privacy. With R replicas, each with noise of standard deviation s / sqrt(R), the sum of
    rounded numbers is distributed as if the global sum with noise s were rounded at random, by
    a B-spline of R boxes. So rounding costs nothing either, except for errors of the order of
    exp(-(pi s)^2 / R), with s in steps of the grid.

    Args:
        noise: The standard deviation of the noise on the global sum, in units of the most that
            one example can change.
        bound: A bound of the absolute sum of all examples, in the same unit.
        replicas: The number of replicas that add noise.

    Attributes:
        step: The grid's step, in the unit of `noise`.
        deviation: The standard deviation that rounding adds, in the same unit.

    Raises:
        ArgumentError: There is too little noise for so many replicas.
    """

    def __init__(self, noise: float, bound: float, replicas: int) -> None:
        # The finest grid on which the sum, plus noise of up to 10 standard deviations on each
        # replica, stays within the whole numbers that float32 adds exactly.
        room = _EXACT / (bound / noise + 10 * math.sqrt(replicas))
        # Each replica's noise must span at least 4 steps of the grid: the error in the class's
        # docstring is then below exp(-(4 pi)^2), about 1e-69.
        least = 4 * math.sqrt(replicas)
        if replicas > 1 and room < least:
            raise ArgumentError(
                "`noise_multiplier` must be large enough for sums over replicas to be exact. "
                f"Received: noise of {noise:g} on {replicas} replicas, with sums of up to "
                f"{bound:g} norms. Use more noise, smaller batches, or strategy='single'."
            )
        steps = max(_FINENESS, math.ceil(math.log2(least)))
        self._steps = 2.0 ** min(steps, math.floor(math.log2(room)))
        self._noise = self._steps / math.sqrt(replicas)
        self._limit = float(_EXACT // replicas)
        self.step = noise / self._steps
        self.deviation = self.step * math.sqrt(replicas / 12)

    def counts(self, value: Tensor, normal: Tensor, unit: Any) -> Tensor:
        """Adds noise to a replica's sum, and rounds it.

        Args:
            value: The sum, float32, a vector or a scalar.
            normal: Normal numbers of variance 1, float64, at least as many as `value` has.
            unit: The most that one example can change `value`.

        Returns:
            Whole numbers, float32. Their sum over replicas times `unit` and `step` is the
            global noisy sum.
        """
        scale = 1 / (tf.cast(unit, tf.float64) * self.step)
        noise, limit = tf.constant(self._noise, tf.float64), tf.constant(self._limit)
        value = tf.convert_to_tensor(value, tf.float32)
        is_large = is_worth_compiling(value.shape.num_elements() or 0)
        return (_compiled if is_large else _rounded)(value, normal, scale, noise, limit)


def _rounded(
    value: Tensor, normal: Tensor, scale: Tensor, noise: Tensor, limit: Tensor
) -> Tensor:
    if value.shape.rank:
        normal = normal[: value.shape[0]]
    noisy = tf.cast(value, tf.float64) * scale + normal * noise
    # The limit does not depend on the data, so clipping to it is post-processing.
    return tf.clip_by_value(tf.cast(tf.round(noisy), tf.float32), -limit, limit)


# Compiled, one loop over all numbers replaces eight.
_compiled = tf.function(_rounded, autograph=False, jit_compile=True)
