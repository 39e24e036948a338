"""A round on the server: its clients are trained by messages."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from tfdist.federated.client import ClientSteps
from tfdist.federated.flower.client import sent_by_server
from tfdist.federated.plan import OfReplica
from tfdist.federated.round import FederatedRound
from tfdist.step.signals import Signals

Tensor = Any


class Asking(Protocol):
    """Sends messages to clients."""

    def ask(self, number: Any, clients: Any, weights: Any, *values: Any) -> Any:
        """Makes the exchange of a round.

        Args:
            number: The number of the round.
            clients: Its clients.
            weights: The weight of each.
            *values: Of the variables that the server sends.

        Returns:
            The weights of those that have answered, and 0 for the others.
        """

    def answer(self, number: int, model: Any, metrics: Any) -> list[Any]:
        """Returns what a client has trained: values of the model, and the state of metrics.

        Args:
            number: Which of the round's clients it is.
            model: The model's values before the round, and their dtypes.
            metrics: Zeros, of the metrics' shapes and dtypes.
        """


class ServerRound(FederatedRound):
    """A round whose clients train by messages."""

    _received: AnsweredSteps
    _asking: Asking

    def asks(self, asking: Asking, model: Any) -> None:
        """Sets who asks the clients.

        Args:
            asking: It sends the messages.
            model: The model.
        """
        self._asking = asking
        self._steps = self._received = AnsweredSteps(model, self._state, 0.0)
        self._received.asking = asking

    def train(self, share: OfReplica, stopping: Tensor, phase: Hashable) -> tuple[Any, Signals]:
        """Asks the clients, and updates the server's model; see `OwnRound`."""
        values = [tf.convert_to_tensor(v) for v in sent_by_server(self._state)]
        inputs = [share.rows[0, 0], share.clients, share.weights, *values]
        weights = tf.numpy_function(self._asking.ask, inputs, tf.float64)
        weights = tf.ensure_shape(weights, share.weights.shape)
        self._received.begin(share.clients, weights)
        return super().train(share._replace(weights=weights), stopping, phase)


class AnsweredSteps(ClientSteps):
    """Takes what a client has trained elsewhere, in place of local steps."""

    asking: Asking

    def begin(self, clients: Tensor, weights: Tensor) -> None:
        """Begins a round.

        Args:
            clients: Its clients.
            weights: What the exchange has returned, so that no answer is taken before it.
        """
        self._clients, self._weights = clients, weights

    def make(
        self, batch: Any, start: Sequence[Tensor], steps_before: Tensor, place: Any
    ) -> None:
        """Takes an answer.

        Args:
            batch: Which of the round's clients it is.
            start: Not needed.
            steps_before: Not needed.
            place: Not needed.
        """
        state = self._state
        kept = [*state.of_model]
        zeros = [np.zeros(v.shape, tf.as_dtype(v.dtype).as_numpy_dtype) for v in state.metrics]

        def answer(number: Any, _: Any, *before: Any) -> list[Any]:
            return self.asking.answer(int(number), before, zeros)

        variables = [*kept, *state.metrics]
        client = self._clients[batch]
        before = [tf.convert_to_tensor(variable) for variable in kept]
        floats = len(state.trained) + len(state.averaged)
        # The client has counted from the server's values, without seeds of its own.
        before[floats:] = state.seeds_of(-client, before[floats:])
        values = tf.numpy_function(
            answer, [batch, self._weights, *before], [tf.as_dtype(v.dtype) for v in variables]
        )
        values = [tf.ensure_shape(a, v.shape) for a, v in zip(values, variables, strict=True)]
        values[floats : len(kept)] = state.seeds_of(client, values[floats : len(kept)])
        for variable, value in zip(kept, values[: len(kept)], strict=True):
            variable.assign(value)
        for variable, value in zip(state.metrics, values[len(kept) :], strict=True):
            variable.assign(tf.convert_to_tensor(variable) + value)
