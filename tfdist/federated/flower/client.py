"""A client on Flower: it makes its local steps of a round, and sends its weights."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist import _keras, data
from tfdist.data.arrays import Arrays
from tfdist.data.epochs import DataPosition
from tfdist.errors import ArgumentError
from tfdist.federated.clients import Clients
from tfdist.federated.extension import FederatedTraining
from tfdist.federated.flower import messages
from tfdist.federated.flower.messages import RoundTask
from tfdist.federated.flower.request import request_of
from tfdist.federated.plan import OfReplica, RoundPlan
from tfdist.federated.round import FederatedRound, Federation
from tfdist.federated.source import Rounds
from tfdist.federated.state import LocalState
from tfdist.samplers import Uniform
from tfdist.step.exchange import Exchange
from tfdist.step.signals import Signals
from tfdist.strategies.base import Place, Strategy
from tfdist.strategies.session import current
from tfdist.training import preflight
from tfdist.training.extension import Continuation, Extension
from tfdist.training.request import Request
from tfdist.training.run import Seeds, Training
from tfdist.training.verification import Verification

Tensor = Any


@dataclass(frozen=True)
class LocalOutcome:
    """What a client has trained.

    Attributes:
        values: Of `LocalState.of_model`, arrays.
        metrics: The state of the metrics after the local steps, arrays.
        kept: The state of the optimizers, if the client keeps it.
        facts: Plain data for the server.
    """

    values: list[Any]
    metrics: list[Any]
    kept: list[Any] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


Train = Callable[[RoundTask, Any, Any, Any, Sequence[Any], Any], LocalOutcome]
"""Trains: the task, a model, the client's data, the server's arrays, kept arrays, context."""


def make_app(model_fn: Callable[[], Any], data_fn: Callable[[Any], Any], train: Train) -> Any:
    """Makes Flower's `ClientApp`.

    Args:
        model_fn: As in `tfdist.flower.client_app`.
        data_fn: As in `tfdist.flower.client_app`.
        train: Makes the local steps.
    """
    app = messages.flower("clientapp").ClientApp()
    types = messages.flower("app")

    def query(message: Any, context: Any) -> Any:
        rows, written = _describe(data_fn(context))
        partition = context.node_config.get("partition-id")
        described = {"partition": partition, "rows": rows, "data": written}
        content = types.RecordDict({"description": messages.plain(described)})
        return types.Message(content, reply_to=message)

    def do(message: Any, context: Any) -> Any:
        task = RoundTask.from_record(message.content["task"])
        kept = _kept(context, task)
        given = message.content["arrays"]
        model = preflight.compiled_model(model_fn)
        outcome = train(task, model, data_fn(context), given, kept, context)
        if outcome.kept:
            state = context.state
            state["tfdist-before"] = messages.arrays(kept)
            state["tfdist-optimizer"] = messages.arrays(outcome.kept)
            state["tfdist-round"] = messages.plain({"number": task.number})
        content = types.RecordDict(
            {
                "arrays": messages.arrays(outcome.values),
                "metrics": messages.arrays(outcome.metrics),
                "facts": messages.plain(outcome.facts),
            }
        )
        return types.Message(content, reply_to=message)

    app.query()(query)
    app.train()(do)
    return app


def _describe(given: Any) -> tuple[int, Any]:
    """Returns the rows of a client's data, and their structure, or None without rows."""
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(given)
    if not data.is_arrays(x):
        raise ArgumentError(
            "`data_fn` must return arrays: x, (x, y) or (x, y, sample_weight). Received: x of "
            f"type {type(x).__name__}."
        )
    if not len(tf.nest.flatten(x)[0]):
        return 0, None
    settings = data.SourceSettings(None, None, Uniform(), shuffle=True, seed=0, training=True)
    source = data.read(x, y, sample_weight, settings)
    assert isinstance(source, Arrays)
    return source.num_rows, messages.structure(source.spec())


def _kept(context: Any, task: RoundTask) -> list[Any]:
    """Returns the state of the optimizers before a round, also if it is asked for again.

    Raises:
        ArgumentError: The node has lost it.
    """
    state = context.state
    if "tfdist-round" not in state:
        if task.has_trained and task.settings["keep_optimizer"]:
            raise ArgumentError(
                "A client must keep its optimizer, and Flower keeps it while its node runs. "
                f"Received: client {task.client}, which has trained before and has none: its "
                "node was started again. Begin again, or use keep_optimizer=False."
            )
        return []
    again = messages.of_plain(state["tfdist-round"])["number"] == task.number
    name = "tfdist-before" if again else "tfdist-optimizer"
    return [array.numpy() for array in state[name].values()]


def train(
    task: RoundTask,
    model: Any,
    given: Any,
    sent: Any,
    kept: Sequence[Any],
    strategy: Any = "auto",
) -> LocalOutcome:
    """Makes the local steps of a round, as `fit` does it.

    Args:
        task: What to do.
        model: A compiled `keras.Model`.
        given: The client's data, as `data_fn` returns it.
        sent: The server's values, as a record of Flower.
        kept: The state of the optimizers after the last round, or nothing.
        strategy: As in `fit`.

    Raises:
        ArgumentError: The data or the model are not those that the server knows.
    """
    session = current(strategy)
    if session.strategy.place.num_workers > 1:
        raise ArgumentError(
            "On Flower, a client is one process. Received: a strategy of "
            f"{session.strategy.place.num_workers} workers. Use 'single'."
        )
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(given)
    request = request_of(
        session, model, (x, y, sample_weight), task.batch_size, task.shuffle, task.seed
    )
    training = _OneClient(task, sent, kept)
    extensions: list[Extension] = [Verification(0), training]
    continuation = Continuation(extensions)
    Training(request, [*extensions, Seeds(), continuation], continuation).run()
    return training.outcome()


class _OwnWork(RoundPlan):
    """The plan of all clients, of which this process has the rows of one."""

    def of_replica(self, number: int, replica: int) -> OfReplica:
        """Returns what a replica of this process does; its number is that in the process."""
        return super().of_replica(number, self._place.first_replica + replica)


class _OneRound(Rounds):
    """The rounds from one on."""

    def __init__(self, rows: Arrays, plan: RoundPlan, number: int) -> None:
        super().__init__(rows, plan)
        self._number = number

    def position_after(self, steps: int) -> DataPosition:
        """Returns the round that was asked for."""
        return DataPosition(number=self._number)


class _OneClient(FederatedTraining):
    """A round of one client, whose weights become the model's."""

    _rounds: Rounds

    def __init__(self, task: RoundTask, sent: Any, kept: Sequence[Any]) -> None:
        super().__init__(task.averaging())
        self._task, self._sent, self._kept = task, sent, kept
        self._round: ClientRound | None = None

    def _make_rounds(self, request: Request, source: Arrays, clients: Clients) -> Rounds:
        """Makes the client's part of the plan of all clients."""
        devices = request.session.strategy.place.local_replicas
        number, client = clients.number, self._task.client
        place = Place(number * devices, client * devices, devices, number, client)
        plan = self._plan(_OwnWork, request, source, clients, place)
        return _OneRound(source, plan, self._task.number)

    def _find_clients(self, request: Request, source: Arrays) -> Clients:
        task = self._task
        if source.num_rows != task.sizes[task.client]:
            raise ArgumentError(
                "`data_fn` must return the same rows in each round. Received: "
                f"{source.num_rows} rows, after {task.sizes[task.client]} at first."
            )
        rows = {task.client: np.arange(source.num_rows)}
        return Clients(np.array(task.sizes), np.arange(len(task.sizes)), rows, "worker")

    def bind(self, request: Request, source: data.Source) -> None:
        """Prepares the round. The server has checked the model, which takes trial steps."""
        assert isinstance(source, Rounds)
        self._rounds, self.round_maker = source, self

    def make(self, model: Any, strategy: Strategy, exchange: Exchange | None) -> ClientRound:
        """Makes the round; see `RoundMaker`."""
        self._round = ClientRound(
            Federation(self._settings, self._rounds), model, strategy, exchange
        )
        self._round.begins_with(self._task, self._sent, self._kept)
        return self._round

    def outcome(self) -> LocalOutcome:
        """Returns what the client has trained."""
        assert self._round is not None
        return self._round.outcome()


class ClientRound(FederatedRound):
    """The round of one client. Its weights become those of the model, as they are."""

    _task: RoundTask
    _sent: Any
    _before: Sequence[Any]

    def begins_with(self, task: RoundTask, sent: Any, kept: Sequence[Any]) -> None:
        """Takes what the server has sent.

        Args:
            task: What to do.
            sent: The server's values, as a record of Flower.
            kept: The state of the optimizers after the last round, or nothing.
        """
        self._task, self._sent, self._before = task, sent, kept
        self._takes_values = True

    def reset(self) -> None:
        """Takes the server's values, and the client's optimizers."""
        super().reset()
        set_values(self._state, self._sent)
        if self._kept is None:
            return
        (first_step, _), (has_begun, _), *tables = self._kept.variables
        first_step.assign(self._task.first_step)
        has_begun.assign(1)
        if self._before:
            variables = [table for table, _ in tables]
            values = messages.fitting(self._before, variables, "kept optimizers")
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)

    def train(self, share: OfReplica, stopping: Tensor, phase: Hashable) -> tuple[Any, Signals]:
        """Trains the client, whose weight in its own average is 1."""
        alone = share._replace(weights=tf.ones_like(share.weights))
        return super().train(alone, stopping, phase)

    def outcome(self) -> LocalOutcome:
        """Returns what the client has trained."""
        tables = [] if self._kept is None else self._kept.variables[2:]
        return LocalOutcome(
            [variable.numpy() for variable in self._state.of_model],
            [variable.numpy() for variable in self._state.metrics],
            [table.numpy() for table, _ in tables],
        )


def sent_by_server(state: LocalState) -> list[Any]:
    """Lists the variables whose values the server sends.

    Args:
        state: The state of local steps.
    """
    return [*state.of_model, *_keras.rates_of(state.optimizers), *state.iterations]


def set_values(state: LocalState, sent: Any) -> None:
    """Gives the variables the values that the server has sent.

    Args:
        state: The state of local steps.
        sent: The values, as a record of Flower.

    Raises:
        ArgumentError: The server has another model.
    """
    variables = sent_by_server(state)
    values = messages.of_arrays(sent, variables, "the server's variables")
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
