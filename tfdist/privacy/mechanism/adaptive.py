"""A clipping norm that follows a quantile of the examples' norms, estimated privately."""

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
    """Moves the clipping norm towards a quantile, by a noisy count of examples within it.

    The logarithm of the norm is a variable. Its gradient is the fraction of examples within
    the norm, minus the quantile (Andrew et al., "Differentially private learning with adaptive
    clipping", NeurIPS 2021, algorithm 1: the geometric update). So it is summed and updated as
    weights are. The norm stays between `LEAST_NORM` and `LARGEST_NORM`. Without these limits,
    gradients of 0 would make it smaller at every step.

    Args:
        model: A compiled, built `keras.Model`.
        mechanism: The mechanism, with a `target_quantile`.
        replicas: The number of replicas that contribute to an update.
    """

    def __init__(self, model: Any, mechanism: Mechanism, replicas: int) -> None:
        assert mechanism.target_quantile is not None
        self._mechanism = mechanism
        self._quantile = mechanism.target_quantile
        self._rounding: Rounding | None = None
        if mechanism.count_noise > 0:
            bound = mechanism.sum_bound(replicas) / 2
            self._rounding = Rounding(mechanism.count_noise, bound, replicas)
        self._log_norm = keras.Variable(
            math.log(mechanism.l2_norm_clip), dtype="float32", name="log_l2_norm_clip"
        )
        self._log_norm.constraint = bounded  # the optimizer applies it
        self._optimizer = keras.optimizers.SGD(mechanism.clip_learning_rate)
        self._optimizer.build([self._log_norm])
        # Strategies look for a model's optimizers among its attachments.
        _keras.attached(model).clip_optimizer = self._optimizer

    def norm(self) -> Tensor:
        """Returns the clipping norm."""
        return tf.exp(bounded(tf.convert_to_tensor(self._log_norm)))

    def restart(self) -> None:
        """Sets the clipping norm to that of the settings."""
        self._log_norm.assign(math.log(self._mechanism.l2_norm_clip))

    def with_noise(self, votes: Tensor, normal: Tensor) -> Tensor:
        """Adds a replica's part of the noise, and rounds. See `Rounding.counts`.

        Args:
            votes: `Clipped.votes` of the replica's examples.
            normal: A normal number of variance 1.
        """
        return votes if self._rounding is None else self._rounding.counts(votes, normal, 1.0)

    def update(self, batch: ReplicaBatch, votes: Tensor) -> None:
        """Contributes a replica's part of the update.

        Args:
            batch: The description of the replica's batch.
            votes: The result of `with_noise`.
        """
        assert batch.updates is not None
        step = 1.0 if self._rounding is None else self._rounding.step

        def update(summed: list[Tensor]) -> None:
            # A vote is 1/2 or -1/2 instead of 1 or 0: an example changes the sum by at most
            # 1/2, so half of the noise is enough.
            within = summed[0] * (step / self._mechanism.expected_units) + 0.5
            with batch.updating():
                self._optimizer.apply([within - self._quantile], [self._log_norm])

        batch.updates.apply(self._optimizer, [votes], update, [self._log_norm])


def bounded(log_norm: Tensor) -> Tensor:
    """Returns the logarithm of a norm, between those of `LEAST_NORM` and `LARGEST_NORM`."""
    return tf.clip_by_value(log_norm, math.log(LEAST_NORM), math.log(LARGEST_NORM))
