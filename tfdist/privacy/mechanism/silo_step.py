"""The private local step of a client in federated training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from tfdist.privacy.mechanism.mechanism import Mechanism
from tfdist.privacy.mechanism.noise import Noise
from tfdist.privacy.mechanism.step import PrivateStep

Tensor = Any


class SiloSteps:
    """Makes the private step of clients; see `federated.protection.LocalProtection`.

    Args:
        mechanism: The clipping and the noise of a local step.
        num_clients: The number of clients, over all workers.
        local_steps: The steps of a client in a round.
    """

    def __init__(self, mechanism: Mechanism, num_clients: int, local_steps: int) -> None:
        self.mechanism = mechanism
        self._num_clients, self._local_steps = num_clients, local_steps
        self._step: tuple[Any, SiloStep] | None = None

    def make(self, model: Any, strategy: Any) -> SiloStep:
        """Makes the step of a model, once: the round and the count of rounds share it.

        Args:
            model: A compiled, built `keras.Model`.
            strategy: The strategy on whose replicas the model trains.
        """
        if self._step is None or self._step[0] is not model:
            made = SiloStep(
                model, self.mechanism, strategy, self._num_clients, self._local_steps
            )
            self._step = model, made
        return self._step[1]


class SiloStep(PrivateStep):
    """Makes the steps of one client: all noise is its own, and nothing is summed with others.

    `begin` and `end` count rounds. Within a round, `of_client` gives the step of a client. The
    noise of each client has a stream of its own, from secrets of the worker that trains it.

    Args:
        model: A compiled, built `keras.Model`.
        mechanism: The clipping and the noise of a local step.
        strategy: The strategy on whose replicas the model trains.
        num_clients: The number of clients, over all workers.
        local_steps: The steps of a client in a round.
    """

    def __init__(
        self,
        model: Any,
        mechanism: Mechanism,
        strategy: Any,
        num_clients: int,
        local_steps: int,
    ) -> None:
        super().__init__(model, mechanism, strategy, Noise(0, num_clients), replicas=1)
        self._local_steps = local_steps
        self._client: Tensor = None
        self._index: Tensor = None
        self._pull: Callable[[Any], Tensor | None] = lambda variable: None

    def of_client(
        self, client: Tensor, index: Tensor, pull: Callable[[Any], Tensor | None]
    ) -> SiloStep:
        """Returns the step for one client; see `federated.protection.LocalStep`.

        Args:
            client: The number of the client, scalar int64.
            index: The number of its local step in the round, scalar int64.
            pull: Returns what is added to the gradient of a `keras.Variable`, or None.
        """
        # A copy, since the replicas of a process are traced beside each other.
        step = copy.copy(self)
        step._client, step._index, step._pull = client, index, pull
        return step

    def requests(self, stopping: Tensor) -> Tensor:
        """Asks all workers to stop if a spot check has failed.

        Args:
            stopping: As in `SpotChecks.requests`.
        """
        return self.spot_checks.requests(stopping)

    def _steps_before(self) -> Tensor:
        return self.counter.steps_before(self._number) * self._local_steps + self._index

    def _penalties(self, variables: Sequence[Any]) -> list[Tensor | None]:
        """Adds the proximal term, which depends on no example but by the noisy weights."""
        return [
            _plus(penalty, self._pull(variable))
            for penalty, variable in zip(super()._penalties(variables), variables, strict=True)
        ]

    def _normal(self, count: int) -> Tensor:
        # Each number is used once: `_number` is new in each round that this process begins.
        step = self._number * self._local_steps + self._index
        return self.noise.normal(count, tf.cast(self._client, tf.int32), step)


def _plus(penalty: Tensor | None, pull: Tensor | None) -> Tensor | None:
    if pull is None:
        return penalty
    pull = tf.cast(pull, tf.float32)  # as penalties and clipped sums are
    return pull if penalty is None else penalty + pull
