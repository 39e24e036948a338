"""The train step of DP-SGD on one replica's share of a batch."""

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
from tfdist.privacy.accounting.correlated import banded
from tfdist.privacy.mechanism.adam import DPAdam
from tfdist.privacy.mechanism.adaptive import AdaptiveClip
from tfdist.privacy.mechanism.counter import StepCounter
from tfdist.privacy.mechanism.grid import Rounding
from tfdist.privacy.mechanism.masks import Masks
from tfdist.privacy.mechanism.mechanism import Mechanism
from tfdist.privacy.mechanism.microbatches import clipped_share
from tfdist.privacy.mechanism.noise import Noise, like
from tfdist.privacy.mechanism.normals import at_once
from tfdist.privacy.mechanism.spot_checks import SpotChecks
from tfdist.privacy.mechanism.unfit_layers import check_untouched
from tfdist.privacy.sampling.cyclic import Recursion
from tfdist.privacy.schedules import Now

Tensor = Any


@dataclass(frozen=True)
class PrivateSteps:
    """Makes the steps of a mechanism.

    Attributes:
        mechanism: What is done to the gradients.
    """

    mechanism: Mechanism

    def make(self, model: Any, strategy: Any) -> PrivateStep:
        """Makes the step of a model.

        Args:
            model: A compiled, built `keras.Model`.
            strategy: Where its replicas are.
        """
        return PrivateStep(model, self.mechanism, strategy)


class PrivateStep:
    """Takes the place of Keras's `train_step`.

    A replica contributes the sum of its examples' clipped gradients and its part of the noise,
    rounded to whole numbers (see `Rounding`); what all contribute is summed as in any step, and
    then divided by what a global batch is expected to hold. Of R replicas each adds noise of
    1 / sqrt(R) of the standard deviation, from a stream of its own: streams that were equal by
    mistake would add more than that.

    Args:
        model: A compiled, built `keras.Model`.
        mechanism: What is done to the gradients.
        strategy: Where the replicas are.
    """

    def __init__(self, model: Any, mechanism: Mechanism, strategy: Any) -> None:
        place = strategy.place
        self.mechanism = mechanism
        self.noise = Noise(place.first_replica, place.local_replicas)
        self.counter = StepCounter()
        self._number: Tensor = None
        self._now: Now | None = None
        self._recursion: Recursion | None = None
        self._correlated: Tensor = None
        self._first_replica = place.first_replica
        if mechanism.cyclic and mechanism.noise_multiplier > 0:
            count = sum(math.prod(v.shape) for v in model.trainable_variables)
            # Other processes compute nothing, in the same graph: Horovod goes by its names.
            count = count if place.first_replica == 0 else 0
            self._recursion = Recursion(banded(mechanism.bands or 1), count)
        self._rounding: Rounding | None = None
        if mechanism.noise_multiplier > 0:
            noisy = place.num_replicas if mechanism.bands is None else 1
            self._rounding = Rounding(
                mechanism.gradient_noise, mechanism.most(place.num_replicas), noisy
            )
        self.masks = Masks()
        self.spot_checks = SpotChecks(model, strategy, mechanism.microbatch_size)
        self.adaptive: AdaptiveClip | None = None
        if mechanism.target_quantile is not None:
            self.adaptive = AdaptiveClip(model, mechanism, place.num_replicas)
        self._model = model
        self._strategy = strategy

    def _norm(self) -> Any:
        if self._now is not None:
            return self._now.norm
        return self.mechanism.l2_norm_clip if self.adaptive is None else self.adaptive.norm()

    def _factor(self, norm: Any) -> Any:
        """Gives what a gradient has for each unit of `_unit` in the sum."""
        if self._now is None:
            return norm / self.mechanism.expected_batch
        return tf.cast(self._now.unit / self.mechanism.expected_batch, tf.float32)

    def _unit(self, norm: Any) -> Any:
        """Gives the norm with which the least noise of a training is that of this step."""
        return norm if self._now is None else self._now.unit

    def _deviation(self) -> Any:
        """Gives the noise's standard deviation on each number of the global gradient."""
        own = math.sqrt(sum(factor**2 for factor in self.mechanism.factors))
        noise = own * self.mechanism.gradient_noise
        if self._rounding is not None:
            noise = math.hypot(noise, self._rounding.deviation)
        return noise * self._factor(self._norm())

    def restart(
        self, seed: int | None, first: int, correlated: Sequence[tuple[int, int]] | None = None
    ) -> None:
        """Begins a `fit`: with new noise, and the norm that was asked for.

        Args:
            seed: As in `Noise.renew`.
            first: The number of the first step.
            correlated: As `Noise.go_on` takes it, where noise is correlated.
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
        """Tells an optimizer that asks for it how much noise there is."""
        optimizer = self._model.optimizer
        if isinstance(optimizer, DPAdam):
            optimizer.noise_deviation = self._deviation
        try:
            yield
        finally:
            if isinstance(optimizer, DPAdam):
                optimizer.noise_deviation = None

    def begin(self, share: Any) -> None:
        """Counts a step of all replicas of this process; called before they make it.

        Args:
            share: What is dealt out to them.
        """
        parts = tf.nest.flatten(share, expand_composites=True)
        self._number = self.counter.begin(parts[0])
        if self.mechanism.schedule is not None:
            self._now = self.mechanism.schedule.at(self.counter.place(self._number))
        if self._recursion is not None:
            replica = tf.constant(self._first_replica)
            own = self.noise.normal(self._recursion.count, replica, self._number)
            self._correlated = self._recursion.next(own)

    def end(self, is_made: Tensor) -> None:
        """Called when they have made it.

        Args:
            is_made: Whether it has changed anything.
        """
        self.counter.end(is_made)
        self._number = self._now = self._correlated = None

    def begin_step(
        self, data: Any, batch: ReplicaBatch, stopping: Tensor
    ) -> tuple[Any, Tensor]:
        """Gives rows their keys, and sees now and then that none depends on another.

        Args:
            data: As in `train_step`.
            batch: As in `train_step`; gets the keys.
            stopping: As `SpotChecks.check` takes it.

        Returns:
            What `SpotChecks.check` gives.
        """
        batch.keys = self.masks.keys(data, batch.offset, self.mechanism.copies)
        columns = keras.utils.unpack_x_y_sample_weight(data)
        step = self.counter.before(self._number)
        columns, stopping = self.spot_checks.check(columns, batch, stopping, step)
        return keras.utils.pack_x_y_sample_weight(*columns), stopping

    def train_step(self, data: Any, batch: ReplicaBatch, groups: Tensor) -> Any:
        """Makes one step, as `keras.Model.train_step` would.

        Args:
            data: A replica's share: `x`, `(x, y)` or `(x, y, sample_weight)`.
            batch: What the replica knows of it.
            groups: The user of each row, where users are clipped; else anything.

        Returns:
            Logs.
        """
        model = self._model
        x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
        # XLA cannot read variables that are on servers.
        compiled = model.jit_compile and not self._strategy.has_servers
        columns = x, y, weight
        norm = self._norm()
        outputs, sums, votes = clipped_share(
            model,
            columns,
            batch,
            self.mechanism,
            norm,
            compiled,
            None if self.mechanism.rows_of_user is None else groups,
        )
        # A share may be padded; what is only there for its shape does not count.
        (x, y, weight), outputs = _first_rows(batch.rows, (x, y, weight), outputs)
        loss = keras_layers.compiled_loss(model, x, y, outputs, weight)
        keras_layers.track_loss(model, loss, tf.shape(tf.nest.flatten(x)[0])[0])
        self._update(batch, sums, votes, norm)
        logs = model.compute_metrics(x, y, outputs, sample_weight=weight)
        check_untouched(model, batch)
        return logs if self.adaptive is None else {**logs, "l2_norm_clip": norm}

    def _update(
        self, batch: ReplicaBatch, sums: list[Tensor], votes: Tensor, norm: Any
    ) -> None:
        """Contributes to the update what a replica's examples give, with its noise."""
        optimizer, variables = self._model.optimizer, self._model.trainable_variables
        assert batch.updates is not None
        factor: Any = 1 / self.mechanism.expected_batch
        if self._rounding is not None:
            sums, votes = self._with_noise(batch, sums, votes, norm)
            factor = self._rounding.step * self._factor(norm)
        # Of no example, so neither clipped nor hidden.
        penalties = _penalties(variables)

        def update(summed: list[Tensor]) -> None:
            gradients = [
                g * factor if r is None else g * factor + r
                for g, r in zip(summed, penalties, strict=True)
            ]
            with batch.updating():
                optimizer.apply(gradients, variables)

        batch.updates.apply(optimizer, sums, update, variables)
        if self.adaptive is not None:
            self.adaptive.update(batch, votes)

    def _with_noise(
        self, batch: ReplicaBatch, sums: list[Tensor], votes: Tensor, norm: Any
    ) -> tuple[list[Tensor], Tensor]:
        assert self._rounding is not None
        variables = self._model.trainable_variables
        count = sum(math.prod(v.shape) for v in variables)
        drawn = self._drawn(at_once(count + (self.adaptive is not None)))
        if self.adaptive is not None:
            votes = self.adaptive.with_noise(votes, drawn[count])
        # Rounded sums of some replicas without noise would show what their examples are.
        correlated = self.mechanism.bands is not None and self._strategy.place.num_replicas > 1
        if correlated:
            sums = batch.all_reduce(sums)
        # As one vector: rounded in one go, however many variables there are.
        flat = tf.concat([tf.reshape(s, [-1]) for s in sums], 0)
        flat = tf.ensure_shape(flat, [count])
        counts = self._rounding.counts(flat, drawn, self._unit(norm))
        if correlated:
            # Known only when it runs: TensorFlow would leave out a sum that a process does not
            # need, and others would wait for it.
            zero = tf.cast(tf.minimum(batch.total, 0), tf.int32)
            is_first = tf.equal(self._strategy.replica_id() + zero, 0)
            counts = tf.where(is_first, counts, tf.zeros_like(counts))
        return like(counts, variables), votes

    def _drawn(self, count: int) -> Tensor:
        """Draws a replica's normal numbers.

        Correlated ones are all drawn by the first: what is taken back must be what was given,
        on whatever number of replicas training goes on.
        """
        replica, step = self._strategy.replica_id(), self._number
        if self.mechanism.bands is None:
            return self.noise.normal(count, replica, step)
        factors, known = self.mechanism.factors, self._correlated

        def of_first() -> Tensor:
            if self._recursion is not None:
                unknown = tf.zeros([count - self._recursion.count], tf.float64)
                return tf.concat([known, unknown], 0)
            return self.noise.correlated(count, replica, step, factors)

        return tf.cond(tf.equal(replica, 0), of_first, lambda: tf.zeros([count], tf.float64))


def _first_rows(rows: Tensor, *structures: Any) -> Any:
    """Cuts all tensors to so many rows, with their masks; one is left where there is none."""
    rows = tf.maximum(tf.cast(rows, tf.int32), 1)

    def cut(leaf: Any) -> Any:
        if leaf is None:
            return None
        kept = leaf[:rows]
        if keras_layers.has_mask(leaf):
            keras_layers.give_mask(kept, keras_layers.mask_of(leaf)[:rows])
        return kept

    return tf.nest.map_structure(cut, structures)


def _penalties(variables: Any) -> list[Tensor | None]:
    """Gives the gradients of the variables' regularizers."""
    found: list[Tensor | None] = []
    for variable in variables:
        if variable.regularizer is None:
            found.append(None)
            continue
        value = tf.cast(tf.convert_to_tensor(variable), tf.float32)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(value)
            penalty = variable.regularizer(value)
        found.append(tape.gradient(penalty, value))
    return found
