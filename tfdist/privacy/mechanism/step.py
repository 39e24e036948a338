"""The train step of DP-SGD on one replica's batch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from tfdist._keras import ReplicaBatch
from tfdist._keras import layers as keras_layers
from tfdist.privacy import model_history
from tfdist.privacy.accounting.correlated import banded
from tfdist.privacy.mechanism.adam import DPAdam
from tfdist.privacy.mechanism.adaptive import AdaptiveClip
from tfdist.privacy.mechanism.counter import StepCounter
from tfdist.privacy.mechanism.grid import Rounding
from tfdist.privacy.mechanism.masks import Masks
from tfdist.privacy.mechanism.mechanism import Mechanism
from tfdist.privacy.mechanism.microbatches import clipped_share, with_any_size
from tfdist.privacy.mechanism.noise import Noise, like
from tfdist.privacy.mechanism.normals import at_once
from tfdist.privacy.mechanism.spot_checks import SpotChecks
from tfdist.privacy.mechanism.update_inputs import (
    gradients_alone,
    keeping_no_state,
    penalties,
    updated_alone,
)
from tfdist.privacy.sampling.cyclic import Recursion
from tfdist.privacy.schedules import ScheduledStep

Tensor = Any


@dataclass(frozen=True)
class PrivateSteps:
    """Makes the private step of a model.

    Attributes:
        mechanism: The clipping and the noise.
    """

    mechanism: Mechanism

    def make(self, model: Any, strategy: Any) -> PrivateStep:
        """Makes the step of a model.

        Args:
            model: A compiled, built `keras.Model`.
            strategy: The strategy on whose replicas the model trains.
        """
        return PrivateStep(model, self.mechanism, strategy)


class PrivateStep:
    """Replaces Keras's `train_step` in private training.

    Each replica sums its examples' clipped gradients, adds its part of the noise, and rounds
    the result to whole numbers (see `Rounding`). The contributions of all replicas are summed
    as in any step. The sum is divided by the expected size of a global batch, not by its size.
    Each of R replicas adds noise with 1 / sqrt(R) of the standard deviation, from its own
    stream. If two streams were equal by mistake, the sum would have more noise, not less.

    Args:
        model: A compiled, built `keras.Model`.
        mechanism: The clipping and the noise.
        strategy: The strategy on whose replicas the model trains.
        noise: The streams of noise. None is one for each replica of this process.
        replicas: The number of replicas whose sums are added up. None is that of the strategy.
    """

    def __init__(
        self,
        model: Any,
        mechanism: Mechanism,
        strategy: Any,
        noise: Noise | None = None,
        replicas: int | None = None,
    ) -> None:
        place = strategy.place
        replicas = place.num_replicas if replicas is None else replicas
        self.mechanism = mechanism
        self.noise = noise or Noise(place.first_replica, place.local_replicas)
        self.counter = StepCounter()
        self._number: Tensor = None
        self._scheduled: ScheduledStep | None = None
        self._recursion: Recursion | None = None
        self._correlated: Tensor = None
        self._first_replica = place.first_replica
        if mechanism.cyclic and mechanism.noise_multiplier > 0:
            count = sum(math.prod(v.shape) for v in model.trainable_variables)
            # Only the first process computes correlated noise. The other processes trace the
            # same operations on empty tensors, since Horovod matches collectives by the names
            # of operations, and names depend on the graph.
            count = count if place.first_replica == 0 else 0
            self._recursion = Recursion(banded(mechanism.bands or 1), count)
        self._rounding: Rounding | None = None
        if mechanism.noise_multiplier > 0:
            noisy = replicas if mechanism.bands is None else 1
            self._rounding = Rounding(
                mechanism.gradient_noise, mechanism.sum_bound(replicas), noisy
            )
        self.masks = Masks()
        self.spot_checks = SpotChecks(model, strategy, mechanism.microbatch_size)
        self.adaptive: AdaptiveClip | None = None
        if mechanism.target_quantile is not None:
            self.adaptive = AdaptiveClip(model, mechanism, replicas)
        self._model = model
        self._strategy = strategy

    def _norm(self) -> Any:
        """Returns the norm to which this step clips."""
        if self._scheduled is not None:
            return self._scheduled.norm
        return self.mechanism.l2_norm_clip if self.adaptive is None else self.adaptive.norm()

    def _factor(self, norm: Any) -> Any:
        """Returns the factor from a sum in units of `_unit` to a mean gradient."""
        if self._scheduled is None:
            return norm / self.mechanism.expected_batch
        return tf.cast(self._scheduled.unit / self.mechanism.expected_batch, tf.float32)

    def _unit(self, norm: Any) -> Any:
        """Returns the unit in which the noise of this step is the schedule's least noise."""
        return norm if self._scheduled is None else self._scheduled.unit

    def _deviation(self) -> Any:
        """Returns the noise's standard deviation on each number of the global gradient."""
        correlation = math.sqrt(sum(factor**2 for factor in self.mechanism.factors))
        noise = correlation * self.mechanism.gradient_noise
        if self._rounding is not None:
            noise = math.hypot(noise, self._rounding.deviation)
        return noise * self._factor(self._norm())

    def restart(
        self, seed: int | None, first: int, correlated: Sequence[tuple[int, int]] | None = None
    ) -> None:
        """Begins a `fit`, with new noise and the clipping norm of the settings.

        Args:
            seed: As in `Noise.renew`.
            first: The number of the first step.
            correlated: The argument of `Noise.go_on` if noise is correlated, else None.
        """
        self.counter.restart()
        self.counter.number_from(first)
        if self._recursion is not None:
            self._recursion.restart()
        if correlated is None:
            self.noise.renew(seed)
        else:
            self.noise.go_on(correlated)
        if self.adaptive is not None:
            self.adaptive.restart()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Gives `DPAdam` access to the noise's standard deviation."""
        optimizer = self._model.optimizer
        if isinstance(optimizer, DPAdam):
            optimizer.noise_deviation = self._deviation
        try:
            yield
        finally:
            if isinstance(optimizer, DPAdam):
                optimizer.noise_deviation = None

    def refuse_other_data(self) -> None:
        """Refuses Keras's own step, which a callback would run on other data.

        Raises:
            ArgumentError: Always.
        """
        raise model_history.trained_meanwhile("`train_on_batch`, or Keras's `fit`")

    def begin(self, share: Any) -> None:
        """Counts a step of all replicas of this process, before they compute it.

        Args:
            share: The batch of this process's replicas.
        """
        parts = tf.nest.flatten(share, expand_composites=True)
        self._number = self.counter.begin(parts[0])
        if self.mechanism.schedule is not None:
            self._scheduled = self.mechanism.schedule.at(self.counter.place(self._number))
        if self._recursion is not None:
            replica = tf.constant(self._first_replica)
            normal = self.noise.normal(self._recursion.count, replica, self._number)
            self._correlated = self._recursion.next(normal)

    def end(self, is_made: Tensor) -> None:
        """Ends a step, after the replicas of this process have computed it.

        Args:
            is_made: Scalar bool: whether the step has changed the weights.
        """
        self.counter.end(is_made)
        self._number = self._scheduled = self._correlated = None

    def begin_step(
        self, data: Any, batch: ReplicaBatch, stopping: Tensor
    ) -> tuple[Any, Tensor]:
        """Gives rows the keys of their random numbers, and runs the spot checks.

        Args:
            data: As in `train_step`.
            batch: As in `train_step`. Its `keys` are set.
            stopping: As in `SpotChecks.check`.

        Returns:
            The result of `SpotChecks.check`.
        """
        data = tf.nest.map_structure(with_any_size, data)
        batch.keys = self.masks.keys(data, batch.offset, self.mechanism.copies)
        columns = keras.utils.unpack_x_y_sample_weight(data)
        norm = self._norm()
        columns, stopping = self.spot_checks.check(
            columns, batch, stopping, self._steps_before(), norm
        )
        return keras.utils.pack_x_y_sample_weight(*columns), stopping

    def _steps_before(self) -> Tensor:
        return self.counter.steps_before(self._number)

    def train_step(self, data: Any, batch: ReplicaBatch, groups: Tensor) -> Any:
        """Makes one step, as `keras.Model.train_step` would.

        Args:
            data: A replica's batch: `x`, `(x, y)` or `(x, y, sample_weight)`.
            batch: Its description.
            groups: The user of each row if users are clipped. Otherwise it is not read.

        Returns:
            Logs.
        """
        model, norm = self._model, self._norm()
        x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
        # XLA cannot read variables that are on servers.
        compiled = model.jit_compile and not self._strategy.has_servers
        users = None if self.mechanism.rows_of_user is None else groups
        columns = x, y, weight
        with keeping_no_state(model, batch):
            outputs, sums, votes = gradients_alone(
                model,
                batch,
                (columns, norm, groups),
                lambda: clipped_share(
                    model, columns, batch, self.mechanism, norm, compiled, users
                ),
            )
            # A replica's batch may be padded to a static shape. Padding must not enter metrics.
            (x, y, weight), outputs = _first_rows(batch.rows, columns, outputs)
            loss = keras_layers.compiled_loss(model, x, y, outputs, weight)
            keras_layers.track_loss(model, loss, tf.shape(tf.nest.flatten(x)[0])[0])
        self._update(batch, sums, votes, norm)
        with keeping_no_state(model, batch):
            logs = model.compute_metrics(x, y, outputs, sample_weight=weight)
        return logs if self.adaptive is None else {**logs, "l2_norm_clip": norm}

    def _update(
        self, batch: ReplicaBatch, sums: list[Tensor], votes: Tensor, norm: Any
    ) -> None:
        """Contributes a replica's sums, with its part of the noise, to the global update."""
        optimizer, variables = self._model.optimizer, self._model.trainable_variables
        assert batch.updates is not None
        factor: Any = 1 / self.mechanism.expected_batch
        if self._rounding is not None:
            sums, votes = self._with_noise(batch, sums, votes, norm)
            factor = self._rounding.step * self._factor(norm)
        # Regularizers do not depend on the data, so they are neither clipped nor noisy.
        regularizing = updated_alone(self._model, batch, (), lambda: self._penalties(variables))

        def update(summed: list[Tensor]) -> None:
            gradients = [
                g * factor if r is None else g * factor + r
                for g, r in zip(summed, regularizing, strict=True)
            ]
            # `apply` divides gradients by the factor of a loss that Keras would have scaled.
            if (scale := optimizer.loss_scale_factor) is not None:
                gradients = [g * scale for g in gradients]
            with batch.updating():
                updated_alone(
                    self._model, batch, summed, lambda: optimizer.apply(gradients, variables)
                )

        batch.updates.apply(optimizer, sums, update, variables)
        if self.adaptive is not None:
            self.adaptive.update(batch, votes)

    def _penalties(self, variables: Sequence[Any]) -> list[Tensor | None]:
        return penalties(variables)

    def _with_noise(
        self, batch: ReplicaBatch, sums: list[Tensor], votes: Tensor, norm: Any
    ) -> tuple[list[Tensor], Tensor]:
        assert self._rounding is not None
        variables = self._model.trainable_variables
        count = sum(math.prod(v.shape) for v in variables)
        normal = self._normal(at_once(count + (self.adaptive is not None)))
        if self.adaptive is not None:
            votes = self.adaptive.with_noise(votes, normal[count])
        # Only the first replica draws correlated noise, and each replica would round its sum by
        # itself. The rounded sum of a replica without noise depends on its examples exactly,
        # which the proof of `Rounding` does not cover. So sums are added up before rounding.
        correlated = self.mechanism.bands is not None and self._strategy.place.num_replicas > 1
        if correlated:
            sums = batch.all_reduce(sums)
        # One vector of all variables needs one rounding operation.
        flat = tf.concat([tf.reshape(s, [-1]) for s in sums], 0)
        flat = tf.ensure_shape(flat, [count])
        counts = self._rounding.counts(flat, normal, self._unit(norm))
        if correlated:
            # All replicas have the sum now, and the update adds them up once more: all but the
            # first contribute 0. The condition must not be a constant of the graph. TensorFlow
            # would then remove the collective above on processes that do not need its result,
            # and the other processes would wait for them forever.
            zero = tf.cast(tf.minimum(batch.total, 0), tf.int32)
            is_first = tf.equal(self._strategy.replica_id() + zero, 0)
            counts = tf.where(is_first, counts, tf.zeros_like(counts))
        return like(counts, variables), votes

    def _normal(self, count: int) -> Tensor:
        """Draws a replica's normal numbers.

        The first replica draws all correlated noise. A later step subtracts part of it, and
        training may then run on another number of replicas.
        """
        replica, step = self._strategy.replica_id(), self._number
        if self.mechanism.bands is None:
            return self.noise.normal(count, replica, step)
        factors, correlated = self.mechanism.factors, self._correlated

        def on_first() -> Tensor:
            if self._recursion is not None:
                padding = tf.zeros([count - self._recursion.count], tf.float64)
                return tf.concat([correlated, padding], 0)
            return self.noise.correlated(count, replica, step, factors)

        return tf.cond(tf.equal(replica, 0), on_first, lambda: tf.zeros([count], tf.float64))


def _first_rows(rows: Tensor, *structures: Any) -> Any:
    """Cuts all tensors and their masks to `rows` rows, but at least one."""
    rows = tf.maximum(tf.cast(rows, tf.int32), 1)

    def cut(leaf: Any) -> Any:
        if leaf is None:
            return None
        first = leaf[:rows]
        if keras_layers.has_mask(leaf):
            keras_layers.give_mask(first, keras_layers.mask_of(leaf)[:rows])
        return first

    return tf.nest.map_structure(cut, structures)
