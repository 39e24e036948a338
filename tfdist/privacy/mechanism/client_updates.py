"""The mechanism of client-level privacy: clipped updates of clients, and noise on their sum."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import tensorflow as tf

from tfdist._keras import ReplicaBatch
from tfdist.privacy import model_history
from tfdist.privacy.accounting.correlated import coefficients
from tfdist.privacy.mechanism.client_norm import AdaptiveNorm
from tfdist.privacy.mechanism.counter import StepCounter
from tfdist.privacy.mechanism.grid import Rounding
from tfdist.privacy.mechanism.noise import Noise
from tfdist.privacy.mechanism.normals import at_once
from tfdist.privacy.mechanism.rounding import gamma, sums_of_squares
from tfdist.step.state import Role
from tfdist.strategies.base import Strategy

Tensor = Any
NORM = "l2_norm_clip"  # in the logs


class ClientUpdates:
    """Clips updates of clients and adds noise; see `federated.protection.UpdateMechanism`.

    Each replica sums its clients' clipped updates, adds its part of the noise, and rounds the
    result to whole numbers, as `PrivateStep` does with gradients. The sum over replicas is
    divided by the expected number of drawn clients, not by their number.

    It counts rounds in the place of a step of its own: see `step.own_step.OwnStep`. The round
    itself is that of federated training.

    Args:
        l2_norm_clip: As in `ClientDP`.
        noise_multiplier: As in `ClientDP`, calibrated if the user set a target.
        sampling_probability: As in `ClientDP`.
        num_clients: The number of clients.
        strategy: The strategy on whose replicas the model trains.
        adaptive: What moves the norm. None keeps it fixed.
        turns: The number of groups of clients that take turns.
        bands: The number of rounds whose noise a round combines. None is independent noise.

    Attributes:
        counter: Counts rounds.
        deviation: The noise's standard deviation on each number of the server's update, in the
            first round.
        num_votes: How many numbers `clip` appends to an update: 1 if the norm is adaptive.

    Raises:
        ArgumentError: There is too little noise for so many replicas.
    """

    def __init__(
        self,
        l2_norm_clip: float,
        noise_multiplier: float,
        sampling_probability: float,
        num_clients: int,
        strategy: Strategy,
        adaptive: AdaptiveNorm | None = None,
        turns: int = 1,
        bands: int | None = None,
    ) -> None:
        place = strategy.place
        self._factors = None if bands is None else coefficients(bands)
        self._adaptive = adaptive
        self._fixed_norm = float(l2_norm_clip)
        self.num_votes = 0 if adaptive is None else 1
        self._expected = sampling_probability * num_clients / turns
        self._strategy = strategy
        self.counter = StepCounter()
        self._noise = Noise(place.first_replica, place.local_replicas)
        self._number: Tensor = None
        self._rounding: Rounding | None = None
        self._vote_unit = 1.0
        self.deviation = 0.0
        if noise_multiplier > 0:
            # More clients than these are drawn with a probability below 2^-64, by Chernoff's
            # bound. All of them may be on one replica.
            most = min(float(num_clients), 2 * self._expected + 64)
            replicas = 1 if self.is_correlated else place.num_replicas
            if adaptive is not None:
                noise_multiplier = adaptive.gradient_noise(noise_multiplier)
                # In units in which the votes have the noise of the updates.
                self._vote_unit = noise_multiplier / adaptive.count_noise
            self._rounding = Rounding(noise_multiplier, most * replicas, replicas)
            factors = 1.0 if self._factors is None else math.hypot(*self._factors)
            noise = math.hypot(factors * noise_multiplier, self._rounding.deviation)
            self.deviation = noise * self._fixed_norm / self._expected

    # --- the updates of clients; see `UpdateMechanism` ------------------------------------

    @property
    def sends_whole_numbers(self) -> bool:
        """Whether the result of `release` consists of whole numbers."""
        return self._rounding is not None

    @property
    def is_correlated(self) -> bool:
        """Whether later rounds subtract noise, which is added to the sum of all replicas."""
        return self._factors is not None

    def clip(self, update: Sequence[Tensor]) -> list[Tensor]:
        """Scales a client's update, so that its norm over all variables is at most the clip.

        Args:
            update: The update of each variable. If it is not finite, it counts as 0.

        Returns:
            The scaled update, and the client's vote if the norm is adaptive.
        """
        # In float64, squares of float32 neither overflow nor underflow.
        wide = [tf.cast(part, tf.float64)[None] for part in update]
        square = tf.add_n([sums_of_squares(part)[0] for part in wide])
        # The roots and products below are rounded too, in float32 at worst.
        norm = tf.sqrt(square) * (1 + gamma(len(wide) + 8))
        limit = tf.cast(self._norm(), tf.float64)
        factor = tf.minimum(tf.math.divide_no_nan(limit, norm), 1)
        factor = tf.where(norm > 0, factor, tf.ones_like(factor))
        counts = tf.math.is_finite(norm)
        bounded = [
            tf.where(counts, part * tf.cast(factor, part.dtype), tf.zeros_like(part))
            for part in update
        ]
        return bounded if self._adaptive is None else [*bounded, self._adaptive.vote(norm)]

    def _norm(self) -> Any:
        return self._fixed_norm if self._adaptive is None else self._adaptive.norm()

    def release(self, sums: Sequence[Tensor]) -> list[Tensor]:
        """Adds a replica's part of the noise, and rounds; see `Rounding.counts`.

        Args:
            sums: The sums of the clipped updates of the replica's clients, and of their votes.
        """
        if self._rounding is None:
            return list(sums)
        norm = self._norm()
        if self._adaptive is not None:
            sums = [*sums[:-1], sums[-1] * tf.cast(self._vote_unit * norm, sums[-1].dtype)]
        sizes = [math.prod(part.shape) for part in sums]
        correlated = self.is_correlated and self._strategy.place.num_replicas > 1
        if correlated:  # as in `PrivateStep`: the first replica adds all noise, before rounding
            sums = self._strategy.all_reduce_sum(list(sums))
        normal = self._normal(at_once(sum(sizes)))
        # One vector of all variables needs one rounding operation.
        flat = tf.concat([tf.reshape(tf.cast(s, tf.float32), [-1]) for s in sums], 0)
        counts = self._rounding.counts(tf.ensure_shape(flat, [sum(sizes)]), normal, norm)
        if correlated:
            # Not a constant of the graph: each process must keep the collective above.
            zero = tf.cast(tf.minimum(tf.abs(counts[0]), 0), tf.int32)
            is_first = tf.equal(self._strategy.replica_id() + zero, 0)
            counts = tf.where(is_first, counts, tf.zeros_like(counts))
        parts = tf.split(counts, sizes) if len(sizes) > 1 else [counts]
        return [tf.reshape(part, s.shape) for part, s in zip(parts, sums, strict=True)]

    def _normal(self, count: int) -> Tensor:
        """Draws a replica's normal numbers. The first replica draws all correlated noise."""
        replica, number = self._strategy.replica_id(), self._number
        factors = self._factors
        if factors is None:
            return self._noise.normal(count, replica, number)
        return tf.cond(
            tf.equal(replica, 0),
            lambda: self._noise.correlated(count, replica, number, factors),
            lambda: tf.zeros([count], tf.float64),
        )

    def mean(self, total: Sequence[Tensor]) -> list[Tensor]:
        """Divides by the expected number of clients.

        Args:
            total: The sum over all replicas of what `release` returned.
        """
        step = 1.0 if self._rounding is None else self._rounding.step
        unit = 1.0 if self._rounding is None else self._norm()
        factor = tf.cast(unit, tf.float64) * (step / self._expected)
        means = [tf.cast(part, tf.float64) * factor for part in total]
        if self._adaptive is not None:
            of_votes = step / self._vote_unit / self._expected
            means[-1] = tf.cast(total[-1], tf.float64) * of_votes
        return means

    @property
    def state(self) -> Sequence[tuple[Any, Role]]:
        """The logarithm of the norm, if it is adaptive."""
        return [] if self._adaptive is None else [(self._adaptive.variable, Role.REPLICATED)]

    def reset(self) -> None:
        """Sets the norm to that of the first round."""
        if self._adaptive is not None:
            self._adaptive.reset()

    def logs(self) -> dict[str, Tensor]:
        """Returns the norm of the present round, if it is adaptive."""
        return {} if self._adaptive is None else {NORM: self._adaptive.norm()}

    def follow(
        self, votes: Sequence[Tensor], choose: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        """Moves the norm, if it is adaptive.

        Args:
            votes: What `mean` returned for the votes: nothing, or one number.
            choose: Chooses the first value if the round counts, else the second.
        """
        if self._adaptive is not None:
            variable = self._adaptive.variable
            before = tf.convert_to_tensor(variable)
            variable.assign(choose(self._adaptive.follow(votes[0]), before))

    # --- the count of rounds; see `OwnStep` -----------------------------------------------

    def make(self, model: Any, strategy: Strategy) -> ClientUpdates:
        """Returns itself: it is made for one training.

        Args:
            model: Not used.
            strategy: Not used.
        """
        return self

    def restart(self, seed: int | None, first: int, correlated: Any = None) -> None:
        """Begins a `fit`, with new noise.

        Args:
            seed: As in `Noise.renew`.
            first: The number of the first round.
            correlated: The argument of `Noise.go_on` if noise is correlated, else None.
        """
        self.counter.restart()
        self.counter.number_from(first)
        if correlated is None:
            self._noise.renew(seed)
        else:
            self._noise.go_on(correlated)

    def running(self) -> contextlib.AbstractContextManager[None]:
        """Does nothing."""
        return contextlib.nullcontext()

    def refuse_other_data(self) -> None:
        """Refuses Keras's own step, which a callback would run on other data.

        Raises:
            ArgumentError: Always.
        """
        raise model_history.trained_meanwhile("`train_on_batch`, or Keras's `fit`")

    def begin(self, share: Any) -> None:
        """Counts a round of all replicas of this process, before they compute it.

        Args:
            share: What these replicas do.
        """
        self._number = self.counter.begin(tf.nest.flatten(share, expand_composites=True)[0])

    def end(self, is_made: Tensor) -> None:
        """Ends a round, after the replicas of this process have computed it.

        Args:
            is_made: Scalar bool: whether the round has changed the weights.
        """
        self.counter.end(is_made)
        self._number = None

    def begin_step(self, data: Any, batch: ReplicaBatch, stopping: Tensor) -> NoReturn:
        """Is never called: the round has local steps."""
        raise NotImplementedError

    def train_step(self, data: Any, batch: ReplicaBatch, groups: Tensor) -> NoReturn:
        """Is never called: the round has local steps."""
        raise NotImplementedError
