"""The train step of DP-SGD on one replica's share of a batch."""

from __future__ import annotations

import math
from typing import Any

import keras
import tensorflow as tf

from tfdist._keras import ReplicaBatch
from tfdist.privacy import _layers
from tfdist.privacy.adam import DPAdam
from tfdist.privacy.adaptive import AdaptiveClip
from tfdist.privacy.masks import Masks
from tfdist.privacy.noise import Noise, like
from tfdist.privacy.pieces import clipped_share
from tfdist.privacy.settings import Mechanism
from tfdist.privacy.spot_checks import SpotChecks

Tensor = Any


class PrivateStep:
    """Takes the place of Keras's `train_step`.

    A replica contributes the sum of its examples' clipped gradients and its part of the noise,
    both divided by what a global batch is expected to hold; contributions are then summed as
    those of any step. Of R replicas each adds noise of 1 / sqrt(R) of the standard deviation,
    from a stream of its own: streams that were equal by mistake would add more than that.

    Args:
        model: A compiled, built `keras.Model`.
        mechanism: What is done to the gradients.
        strategy: Where the replicas are.
    """

    def __init__(self, model: Any, mechanism: Mechanism, strategy: Any) -> None:
        place = strategy.place
        self.mechanism = mechanism
        self.noise = Noise(place.first_replica, place.local_replicas)
        self.masks = Masks()
        self.spot_checks = SpotChecks(model, strategy, mechanism.microbatch_size)
        self.adaptive: AdaptiveClip | None = None
        if mechanism.target_quantile is not None:
            self.adaptive = AdaptiveClip(model, mechanism)
        if isinstance(model.optimizer, DPAdam):
            model.optimizer.noise_deviation = self._deviation
        self._model = model
        self._strategy = strategy

    def _norm(self) -> Any:
        return self.mechanism.l2_norm_clip if self.adaptive is None else self.adaptive.norm()

    def _deviation(self) -> Any:
        """Gives the noise's standard deviation on each number of the global gradient."""
        own = math.sqrt(sum(factor**2 for factor in self.mechanism.factors))
        noise = own * self.mechanism.gradient_noise
        return noise * self._norm() / self.mechanism.expected_batch

    def restart(self, seed: int | None, correlated: tuple[int, int] | None = None) -> None:
        """Begins a `fit`: with new noise, and the norm that was asked for.

        Args:
            seed: As in `Noise.renew`.
            correlated: As `Noise.go_on` takes it, where noise is correlated.
        """
        if correlated is None:
            self.noise.renew(seed)
        else:
            self.noise.go_on(*correlated)
        if self.adaptive is not None:
            self.adaptive.restart()

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
        columns, stopping = self.spot_checks.check(columns, batch, stopping)
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
        loss = _layers.compiled_loss(model, x, y, outputs, weight)
        _layers.track_loss(model, loss, tf.shape(tf.nest.flatten(x)[0])[0])
        variables = model.trainable_variables
        replicas = self._strategy.place.num_replicas
        expected = self.mechanism.expected_batch
        sums, votes = self._with_noise(sums, votes, norm, replicas)
        noisy = [s / expected for s in sums]
        # Of no example, so neither clipped nor hidden.
        gradients = [
            g if r is None else g + r / replicas
            for g, r in zip(noisy, _penalties(variables), strict=True)
        ]
        model.optimizer.apply(gradients, variables)
        logs = model.compute_metrics(x, y, outputs, sample_weight=weight)
        if self.adaptive is None:
            return logs
        self.adaptive.update(votes, replicas)
        return {**logs, "l2_norm_clip": norm}

    def _with_noise(
        self, sums: list[Tensor], votes: Tensor, norm: Any, replicas: int
    ) -> tuple[list[Tensor], Tensor]:
        mechanism = self.mechanism
        if mechanism.noise_multiplier == 0:
            return sums, votes
        variables = self._model.trainable_variables
        count = sum(math.prod(v.shape) for v in variables)
        votes_too = self.adaptive is not None
        drawn = self._drawn(count + int(votes_too))
        part = 1 / math.sqrt(replicas) if mechanism.bands is None else 1.0
        if votes_too:
            drawn, of_votes = tf.split(drawn, [count, 1])
            votes += of_votes[0] * (mechanism.count_noise * part)
        noises = like(drawn * (mechanism.gradient_noise * norm * part), variables)
        return [s + n for s, n in zip(sums, noises, strict=True)], votes

    def _drawn(self, count: int) -> Tensor:
        """Draws a replica's normal numbers.

        Correlated ones are all drawn by the first: what is taken back must be what was given,
        on whatever number of replicas training goes on.
        """
        replica, step = self._strategy.replica_id(), self._model.optimizer.iterations
        if self.mechanism.bands is None:
            return self.noise.normal(count, replica, step)
        step, factors = tf.convert_to_tensor(step), self.mechanism.factors
        return tf.cond(
            tf.equal(replica, 0),
            lambda: self.noise.correlated(count, replica, step, factors),
            lambda: tf.zeros([count]),
        )


def _first_rows(rows: Tensor, *structures: Any) -> Any:
    """Cuts all tensors to so many rows, with their masks; one is left where there is none."""
    rows = tf.maximum(tf.cast(rows, tf.int32), 1)

    def cut(leaf: Any) -> Any:
        if leaf is None:
            return None
        kept = leaf[:rows]
        if _layers.has_mask(leaf):
            kept._keras_mask = leaf._keras_mask[:rows]
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
