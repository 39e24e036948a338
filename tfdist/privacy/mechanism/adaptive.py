"""A norm to clip to that follows a quantile of the examples' norms, found privately."""

from __future__ import annotations

import math
from typing import Any

import keras
import tensorflow as tf

from tfdist import _keras
from tfdist._keras import ReplicaBatch
from tfdist.privacy.mechanism.grid import Rounding
from tfdist.privacy.mechanism.mechanism import Mechanism
from tfdist.privacy.settings import LARGEST_NORM, LEAST_NORM

Tensor = Any


class AdaptiveClip:
    """Moves the norm towards the quantile, by the noisy number of examples within it.

    The logarithm of the norm is a variable, whose gradient is the part of examples within it
    less the quantile (Andrew et al., "Differentially private learning with adaptive clipping",
    NeurIPS 2021, algorithm 1: the geometric update). So it is summed and updated as weights
    are. The norm stays between `LEAST_NORM` and `LARGEST_NORM`: gradients of 0 would else make
    it smaller without end.

    Args:
        model: A compiled, built `keras.Model`.
        mechanism: With a `target_quantile`.
        replicas: How many contribute to an update.
    """

    def __init__(self, model: Any, mechanism: Mechanism, replicas: int) -> None:
        assert mechanism.target_quantile is not None
        self._mechanism = mechanism
        self._quantile = mechanism.target_quantile
        self._rounding: Rounding | None = None
        if mechanism.count_noise > 0:
            most = mechanism.most(replicas) / 2
            self._rounding = Rounding(mechanism.count_noise, most, replicas)
        self._log_norm = keras.Variable(
            math.log(mechanism.l2_norm_clip), dtype="float32", name="log_l2_norm_clip"
        )
        self._log_norm.constraint = _within  # the optimizer keeps to it
        self._optimizer = keras.optimizers.SGD(mechanism.clip_learning_rate)
        self._optimizer.build([self._log_norm])
        # Where strategies look for a model's optimizers.
        _keras.attached(model).clip_optimizer = self._optimizer

    def norm(self) -> Tensor:
        """Gives the norm to clip to."""
        return tf.exp(_within(tf.convert_to_tensor(self._log_norm)))

    def restart(self) -> None:
        """Begins with the norm that was asked for."""
        self._log_norm.assign(math.log(self._mechanism.l2_norm_clip))

    def with_noise(self, votes: Tensor, drawn: Tensor) -> Tensor:
        """Adds a replica's part of the noise, and rounds; see `Rounding.counts`.

        Args:
            votes: `Clipped.votes` of its examples.
            drawn: A normal number of variance 1.
        """
        return votes if self._rounding is None else self._rounding.counts(votes, drawn, 1.0)

    def update(self, batch: ReplicaBatch, votes: Tensor) -> None:
        """Contributes a replica's part of the update.

        Args:
            batch: What the replica knows.
            votes: What `with_noise` gave.
        """
        assert batch.updates is not None
        step = 1.0 if self._rounding is None else self._rounding.step

        def update(summed: list[Tensor]) -> None:
            # Votes are of a half, so that one example changes their sum by no more than that.
            within = summed[0] * (step / self._mechanism.expected_units) + 0.5
            with batch.updating():
                self._optimizer.apply([within - self._quantile], [self._log_norm])

        batch.updates.apply(self._optimizer, [votes], update, [self._log_norm])


def _within(log_norm: Tensor) -> Tensor:
    return tf.clip_by_value(log_norm, math.log(LEAST_NORM), math.log(LARGEST_NORM))
