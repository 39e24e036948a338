"""The server on Flower: a `fit` whose clients train elsewhere, by messages."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist import data
from tfdist.data.arrays import Arrays
from tfdist.errors import ArgumentError
from tfdist.federated.clients import Clients
from tfdist.federated.extension import FederatedTraining
from tfdist.federated.flower import messages
from tfdist.federated.flower.messages import TAKEN, RoundTask
from tfdist.federated.flower.nodes import Nodes
from tfdist.federated.flower.request import request_of
from tfdist.federated.flower.server_round import ServerRound
from tfdist.federated.flower.settings import ServerSettings
from tfdist.federated.plan import OfReplica, RoundPlan
from tfdist.federated.round import Federation
from tfdist.federated.source import Rounds
from tfdist.step.exchange import Exchange
from tfdist.strategies.base import Strategy
from tfdist.strategies.session import current
from tfdist.training import preflight
from tfdist.training.extension import Continuation, Extension
from tfdist.training.request import Request
from tfdist.training.run import Seeds, Training
from tfdist.training.verification import Verification

Tensor = Any


def serve(
    grid: Any,
    model_fn: Callable[[], Any],
    settings: ServerSettings,
    continuation_of: Callable[[Strategy, Sequence[Extension]], Continuation],
) -> tuple[Any, Any]:
    """Makes all rounds of a run.

    Args:
        grid: Flower's `Grid`.
        model_fn: Makes the model.
        settings: The settings.
        continuation_of: Makes what says where the training begins.

    Returns:
        The trained model, and Keras's `History`.

    Raises:
        PeerError: A client that is needed does not answer.
        ArgumentError: Clients have other data or models than the server.
    """
    session, model = current("single"), preflight.compiled_model(model_fn)
    shows = settings.verbose != 0

    def say(text: str) -> None:
        if shows:
            print(f"tfdist: {text}", flush=True)

    nodes = Nodes(grid, settings.num_clients, settings.timeout, settings.lost, say)
    clients = nodes.meet()
    structures = [client.data for client in clients if client.data is not None]
    if any(other != structures[0] for other in structures[1:]):
        raise ArgumentError(
            "All clients must hold data of the same shapes and dtypes. Received: "
            f"{structures}. Mend `data_fn`."
        )
    columns = keras.utils.unpack_x_y_sample_weight(messages.one_row(structures[0]))
    request = dataclasses.replace(
        request_of(
            session, model, columns, settings.batch_size, settings.shuffle, settings.seed
        ),
        epochs=settings.rounds,
        verbose=settings.verbose,
        callbacks=settings.callbacks,
        validation_data=settings.validation_data,
    )
    training = _Server(settings, nodes, say)
    extensions: list[Extension] = [Verification(0), training]
    continuation = continuation_of(session.strategy, extensions)
    try:
        run = Training(request, [*extensions, Seeds(), continuation], continuation)
        history = run.run()
    except tf.errors.OpError:
        if training.failure is not None:  # TensorFlow has wrapped it
            raise training.failure from None
        raise
    finally:
        continuation.close()
    return model, history


class _Messages(RoundPlan):
    """A plan in which the only replica asks all clients of a round, in their order."""

    def of_replica(self, number: int, replica: int) -> OfReplica:
        """Returns whom the server asks. Each client has one step: its answer.

        `rows` has the number of the round, for each client.
        """
        planned = self.round(number)
        count = len(planned.clients)
        ones = np.ones(count, np.int64)
        held = self.clients.sizes[planned.clients].sum()
        return OfReplica(
            np.full([count, 1], number, np.int64),
            ones,
            planned.clients,
            ones,
            planned.weights,
            np.zeros(count, np.int64),
            planned.clients,
            np.array([held, held], np.int64),
            planned.steps.max(),
            np.int64(number),
            planned.check,
        )


class _Exchanges(Rounds):
    """Rounds of clients that are elsewhere. The rows are zeros, and only tell their shape."""

    def batch_of(self, share: OfReplica) -> Callable[[Tensor], Any]:
        """Makes a function that returns which of the answers a step takes."""
        return lambda step: step

    def sample(self, rows: int = 8) -> Any:
        """Returns random rows."""
        return data.Source.sample(self, rows)


class _Server(FederatedTraining):
    """Rounds in which clients train by messages.

    Attributes:
        failure: What has gone wrong in a round, or None.
    """

    _exchanges: Rounds
    _first_step: int = 0

    def __init__(
        self, settings: ServerSettings, nodes: Nodes, say: Callable[[str], None]
    ) -> None:
        # What clients keep is kept by them.
        super().__init__(dataclasses.replace(settings.federated, keep_optimizer=False))
        self._of_clients = {name: getattr(settings.federated, name) for name in TAKEN}
        self._batch_size = settings.batch_size
        self._nodes = nodes
        self._say = say
        self._request: Request | None = None
        self.failure: Exception | None = None
        self._answers: list[Any] = []
        self._trained: set[int] = set()

    def _make_rounds(self, request: Request, source: Arrays, clients: Clients) -> Rounds:
        """Makes the plan of the messages."""
        self._request = request
        return _Exchanges(source, self._plan(_Messages, request, source, clients))

    def _find_clients(self, request: Request, source: Arrays) -> Clients:
        sizes = np.array([client.rows for client in self._nodes.clients], np.int64)
        return Clients(sizes, np.arange(len(sizes)), {}, "node")

    def settings(self) -> Any:
        """Returns the settings and the clients, which must not change when it continues."""
        rows = [client.rows for client in self._nodes.clients]
        return super().settings() | {"rows": rows}

    def bind(self, request: Request, source: data.Source) -> None:
        """Prepares the rounds."""
        super().bind(request, source)
        assert isinstance(source, Rounds)
        optimizer = request.model.optimizer
        self._first_step = 0 if optimizer is None else int(optimizer.iterations.numpy())
        self._exchanges, self.round_maker = source, self

    def make(self, model: Any, strategy: Strategy, exchange: Exchange | None) -> ServerRound:
        """Makes the rounds; see `RoundMaker`."""
        made = ServerRound(
            Federation(self._settings, self._exchanges), model, strategy, exchange
        )
        made.asks(self, model)
        return made

    def ask(self, number: Any, clients: Any, weights: Any, *values: Any) -> Any:
        """Makes the exchange of a round; see `Asking`."""
        try:
            return self._ask(int(number), [int(client) for client in clients], weights, values)
        except Exception as error:
            self.failure = error
            raise

    def _ask(self, number: int, clients: list[int], weights: Any, values: Any) -> Any:
        assert self._request is not None
        types = messages.flower("app")
        sent = messages.arrays(values)
        contents = {
            client: types.RecordDict(
                {"arrays": sent, "task": self._task(number, client).to_record()}
            )
            for client in clients
        }
        answers = self._nodes.train(number, contents)
        self._trained |= set(answers)
        self._answers = [answers.get(client) for client in clients]
        facts = [messages.of_plain(content["facts"]) for content in answers.values()]
        spent = [fact["epsilon"] for fact in facts if "epsilon" in fact]
        if spent:
            self._say(f"round {number + 1}: epsilon of the clients' examples: {max(spent):.4g}")
        weights = np.where([answer is not None for answer in self._answers], weights, 0.0)
        return weights if len(answers) == len(clients) else weights / weights.sum()

    def _task(self, number: int, client: int) -> RoundTask:
        assert self._request is not None
        assert self._request.seed is not None
        return RoundTask(
            number,
            client,
            tuple(described.rows for described in self._nodes.clients),
            self._batch_size,
            self._request.seed,
            self._request.shuffle,
            self._of_clients,
            self._first_step,
            client in self._trained,
        )

    def answer(self, number: int, model: Any, metrics: Any) -> list[Any]:
        """Returns what a client has trained; see `Asking`."""
        content = self._answers[number]
        if content is None:  # its weight is 0
            return [*model, *metrics]
        try:
            return [
                *messages.of_arrays(content["arrays"], model, "a client's variables"),
                *messages.of_arrays(content["metrics"], metrics, "a client's metrics"),
            ]
        except Exception as error:
            self.failure = error
            raise
