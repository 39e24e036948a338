"""A clipping norm that follows a quantile of the norms of clients' updates."""

from __future__ import annotations

import math
from typing import Any

import keras
import tensorflow as tf

from tfdist.privacy.mechanism.adaptive import bounded
from tfdist.privacy.mechanism.mechanism import noise_beside_count

Tensor = Any


class AdaptiveNorm:
    """Moves the clipping norm towards a quantile, by a noisy count of clients within it.

    The norm is multiplied by exp(-rate * (b - quantile)), where b is the estimated fraction of
    drawn clients whose updates are not clipped (Andrew et al., "Differentially private learning
    with adaptive clipping", NeurIPS 2021, algorithm 1). It stays between `LEAST_NORM` and
    `LARGEST_NORM`.

    A client votes 1/2 or -1/2 instead of 1 or 0. It changes the sum of votes by at most 1/2, so
    half of the noise is enough.

    Args:
        first: The norm of the first round.
        quantile: The fraction of clients that shall not be clipped.
        rate: The learning rate of the norm's logarithm.
        count_noise: The standard deviation of the noise on the number of clients within it.

    Attributes:
        variable: The logarithm of the norm.
        count_noise: As in the argument.
    """

    def __init__(self, first: float, quantile: float, rate: float, count_noise: float) -> None:
        self._first, self._quantile, self._rate = math.log(first), quantile, rate
        self.count_noise = count_noise
        self.variable = keras.Variable(self._first, dtype="float32", name="log_l2_norm_clip")

    def norm(self) -> Tensor:
        """Returns the clipping norm, a float32 scalar."""
        return tf.exp(tf.convert_to_tensor(self.variable))

    def reset(self) -> None:
        """Sets the norm to that of the first round."""
        self.variable.assign(self._first)

    def gradient_noise(self, noise_multiplier: float) -> float:
        """Returns the noise on the sum of updates, in units of the norm.

        The updates and the votes are two Gaussian mechanisms. Together they cost as much as one
        with `noise_multiplier` (Andrew et al., theorem 1).

        Args:
            noise_multiplier: The noise that is accounted for; at most 2 `count_noise`.
        """
        return noise_beside_count(noise_multiplier, self.count_noise)

    def vote(self, norm: Tensor) -> Tensor:
        """Returns the vote of a client.

        Args:
            norm: The norm of its update. It is outside of the clipping norm if it is NaN.
        """
        within = tf.cast(norm, tf.float32) <= self.norm()
        return tf.where(within, 0.5, -0.5)

    def follow(self, votes: Tensor) -> Tensor:
        """Returns the next value of `variable`.

        Args:
            votes: The noisy sum of votes over the expected number of clients.
        """
        fraction = tf.cast(votes, tf.float32) + 0.5
        moved = tf.convert_to_tensor(self.variable) - self._rate * (fraction - self._quantile)
        return bounded(moved)
