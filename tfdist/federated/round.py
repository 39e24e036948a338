"""A round on a replica: its clients train one after the other, then all replicas average."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from tfdist import _keras
from tfdist.errors import ArgumentError, DisagreementError
from tfdist.federated.client import ClientSteps
from tfdist.federated.client_optimizers import KeptOptimizers
from tfdist.federated.client_values import RoundStart, loop, plus, values_of, wide
from tfdist.federated.masks import PairwiseMasks
from tfdist.federated.plan import OfReplica
from tfdist.federated.protection import LocalProtection, UpdateMechanism
from tfdist.federated.settings import FedAvg
from tfdist.federated.source import Rounds
from tfdist.federated.state import SEEDS_OF_ROUND, LocalState, state_of
from tfdist.federated.sums import NOT_CANCELLED, RoundSums, Sums
from tfdist.step.agreement import StepAgreement
from tfdist.step.exchange import Exchange
from tfdist.step.signals import Signals, signals_of
from tfdist.step.state import AnyRole, Role
from tfdist.strategies.base import Strategy

Tensor = Any


@dataclass(frozen=True, eq=False)
class Federation:
    """Makes the rounds; see `RoundMaker`. No two are equal, since each has data of its own.

    Attributes:
        settings: The settings.
        source: The rounds' input.
        protection: What protects clients, or None.
        masks: The masks of secure sums, or None.
        local: What protects examples in the local steps of clients, or None.
    """

    settings: FedAvg
    source: Rounds
    protection: UpdateMechanism | None = None
    masks: PairwiseMasks | None = None
    local: LocalProtection | None = None

    def make(self, model: Any, strategy: Strategy, exchange: Exchange | None) -> FederatedRound:
        """Makes the rounds of a model.

        Args:
            model: A compiled, built `keras.Model`.
            strategy: The strategy on whose replicas it trains.
            exchange: Another extension's wrapper of the reduction, or None.

        Raises:
            ArgumentError: The reduction is compressed, and sums are secure.
        """
        if self.settings.secure is not None and exchange is not None:
            raise ArgumentError(
                "Secure sums must be of whole numbers. Received: `secure` of "
                f"`{type(self.settings).__name__}` and compression. Leave one of them out."
            )
        return FederatedRound(self, model, strategy, exchange)


class FederatedRound:
    """Rounds of one model on one strategy; see `OwnRound`.

    Args:
        federation: The settings, and the rounds' input.
        model: A compiled, built `keras.Model`.
        strategy: The strategy on whose replicas it trains.
        exchange: Another extension's wrapper of the reduction, or None.
    """

    def __init__(
        self, federation: Federation, model: Any, strategy: Strategy, exchange: Exchange | None
    ) -> None:
        settings, source = federation.settings, federation.source
        self._source = source
        self._strategy = strategy
        self._exchange = exchange
        self._protection = federation.protection
        local = federation.local
        self._is_private = self._protection is not None or local is not None
        state = state_of(model)
        self._state: LocalState = state.protected(model) if self._is_private else state
        self._steps = ClientSteps(
            model,
            self._state,
            settings.proximal,
            self._is_private,
            None if local is None else local.step_of(model, strategy),
        )
        plan = source.plan
        self._kept: KeptOptimizers | None = None
        if settings.keep_optimizer:
            slots = plan.slots_per_replica, plan.num_slots
            self._kept = KeptOptimizers(self._state, *slots)
        self._server: Any = None
        if settings.server_optimizer is not None:
            self._server = _keras.built_copy(settings.server_optimizer, self._state.trained)
        # The only client's values are taken as they are: w - (w - y) is not y in floats.
        alone = plan.clients.number == 1 and self._protection is None
        self._takes_values = alone and self._server is None and exchange is None
        secure = None
        if settings.secure is not None and federation.masks is not None:
            secure = settings.secure, federation.masks
        self._sums = RoundSums(strategy, self._state.trained, self._protection, secure)

    @property
    def state(self) -> Sequence[tuple[Any, AnyRole]]:
        """The server's optimizer, those that clients keep, and what protects clients."""
        of_server = [] if self._server is None else self._server.variables
        of_clients = [] if self._kept is None else self._kept.variables
        protecting = [] if self._protection is None else self._protection.state
        return [
            *((variable, Role.REPLICATED) for variable in of_server),
            *of_clients,
            *protecting,
        ]

    @property
    def optimizers(self) -> Sequence[Any]:
        """The server's optimizer."""
        return [] if self._server is None else [self._server]

    def reset(self) -> None:
        """Begins with new optimizers of clients. The server's is new with this object."""
        if self._kept is not None:
            self._kept.reset()
        if self._protection is not None:
            self._protection.reset()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Explains an error of a secure sum."""
        try:
            yield
        except tf.errors.InvalidArgumentError as error:
            if NOT_CANCELLED not in error.message:
                raise
            raise DisagreementError(
                "All workers must make the same rounds in a secure sum, or its masks do not "
                "cancel. Received: a sum with masks left. The round changed nothing. Start the "
                "workers again."
            ) from None

    def train(self, share: OfReplica, stopping: Tensor, phase: Hashable) -> tuple[Any, Signals]:
        """Trains the replica's clients, and updates the server's model; see `OwnRound`."""
        state = self._state
        metrics_before = values_of(state.metrics)
        iterations = values_of(state.iterations)
        start = self._start(iterations)
        own = self._train_clients(share, start)
        stopping = self._steps.requests(stopping)
        agreement = StepAgreement(
            self._strategy,
            share,  # type: ignore[arg-type]
            stopping,
            sum(int(np.prod(v.shape)) for v in state.trained),
            None if self._exchange is None else (self._exchange, phase),
        )
        sums, more_logs = self._sums.over_replicas(agreement, share, own)
        agreement.finish()
        if self._protection is not None:
            more_logs = {**more_logs, **self._protection.logs()}
        self._update_model(agreement, start, sums)
        longest = agreement.choose(share.longest, tf.zeros_like(share.longest))
        for variable, value in zip(state.of_optimizers, state.first, strict=True):
            variable.assign(tf.broadcast_to(tf.cast(value, variable.dtype), variable.shape))
        for variable, value in zip(state.iterations, iterations, strict=True):
            variable.assign(value + tf.cast(longest, value.dtype))
        for variable, value, change in zip(
            state.metrics, metrics_before, sums.metrics, strict=True
        ):
            variable.assign(value + agreement.choose(change, tf.zeros_like(change)))
        logs = self._steps.logs()
        logs = {**logs, **more_logs} if more_logs else logs
        return logs, signals_of(agreement, share)  # type: ignore[arg-type]

    def _start(self, iterations: Sequence[Tensor]) -> RoundStart:
        state = self._state
        now = tf.cast(iterations[0], tf.int64) if iterations else tf.constant(0, tf.int64)
        before = now if self._kept is None else self._kept.begin(now)
        return RoundStart(
            values_of(state.trained),
            values_of(state.averaged),
            values_of(state.counted),
            before,
        )

    def _train_clients(self, share: OfReplica, start: RoundStart) -> Sums:
        """Trains the replica's clients one after the other.

        Returns:
            Their weighted updates w - y, or values y if `_takes_values`, and what they have
            added to whole numbers and to metrics.
        """
        batch_of = self._source.batch_of(share)
        number = tf.size(share.clients, tf.int64)
        zero = tf.constant(0, tf.int64)
        sums = Sums(
            [tf.zeros_like(self._wide(value)) for value in start.trained],
            [*map(tf.zeros_like, map(self._wide, start.averaged)), *self._no_votes()],
            [tf.zeros_like(value, tf.int64) for value in start.counted],
            [tf.zeros_like(value) for value in values_of(self._state.metrics)],
        )

        def train_client(i: Tensor, step: Tensor, sums: Sums) -> tuple[Tensor, Tensor, Sums]:
            self._begin_client(share, i, start)
            first, end = step, step + share.steps[i]

            def local_step(step: Tensor) -> tuple[Tensor]:
                place = share.clients[i], step - first
                self._steps.make(batch_of(step), start.trained, start.steps_before, place)
                return (step + 1,)

            loop(lambda step: step < end, local_step, (step,))
            return i + 1, end, self._add(sums, share, i, start)

        return loop(lambda i, *_: i < number, train_client, (zero, zero, sums))[2]  # type: ignore[no-any-return]

    def _no_votes(self) -> list[Tensor]:
        count = 0 if self._protection is None else self._protection.num_votes
        return [tf.zeros([], tf.float64) for _ in range(count)]

    def _wide(self, value: Tensor) -> Tensor:
        """Returns a value in a type in which sums over clients are precise enough.

        Rounding errors of float32 add up to several clipping norms in sums of thousands of
        protected clients, which one client more or less would change.
        """
        return wide(value) if self._protection is None else tf.cast(value, tf.float64)

    def _begin_client(self, share: OfReplica, i: Tensor, start: RoundStart) -> None:
        state = self._state
        counted = state.seeds_of(share.streams[i], start.counted)
        values = [*start.trained, *start.averaged, *counted]
        for variable, value in zip(state.of_model, values, strict=True):
            variable.assign(value)
        first: Sequence[Any] = state.first
        if self._kept is not None:
            first = self._kept.read(share.slots[i])
        for variable, value in zip(state.of_optimizers, first, strict=True):
            variable.assign(tf.broadcast_to(tf.cast(value, variable.dtype), variable.shape))
        # A step may read a metric. It must not see the clients that came before on the replica.
        for variable in state.metrics:
            variable.assign(tf.zeros_like(tf.convert_to_tensor(variable)))

    def _add(self, sums: Sums, share: OfReplica, i: Tensor, start: RoundStart) -> Sums:
        """Adds what a client contributes when it has made its local steps."""
        state = self._state
        if self._kept is not None:
            self._kept.write(share.slots[i], values_of(state.of_optimizers))
        weight = share.weights[i]
        if self._protection is not None:
            return self._add_protected(self._protection, sums, start, weight)

        def weighted(variable: Any, value: Tensor) -> Tensor:
            own, value = wide(tf.convert_to_tensor(variable)), wide(value)
            update = own if self._takes_values else value - own
            return tf.cast(weight, update.dtype) * update

        counted = state.seeds_of(share.streams[i], start.counted)
        added = [
            tf.cast(tf.convert_to_tensor(variable) - value, tf.int64)
            for variable, value in zip(state.counted, counted, strict=True)
        ]
        return Sums(
            plus(sums.trained, map(weighted, state.trained, start.trained)),
            plus(sums.averaged, map(weighted, state.averaged, start.averaged)),
            plus(sums.counted, added),
            plus(sums.metrics, values_of(state.metrics)),
        )

    def _add_protected(
        self, protection: UpdateMechanism, sums: Sums, start: RoundStart, weight: Tensor
    ) -> Sums:
        """Adds the bounded update of a client: of weights and statistics together.

        Its weight is at most 1, so it cannot enlarge what was bounded. Votes have none.
        """
        variables = [*self._state.trained, *self._state.averaged]
        values = [*start.trained, *start.averaged]
        update = [
            wide(value) - wide(tf.convert_to_tensor(variable))
            for variable, value in zip(variables, values, strict=True)
        ]
        clipped = [self._wide(part) for part in protection.clip(update)]
        bounded = [part * tf.cast(weight, part.dtype) for part in clipped[: len(update)]]
        bounded += clipped[len(update) :]
        number = len(sums.trained)
        return Sums(
            plus(sums.trained, bounded[:number]),
            plus(sums.averaged, bounded[number:]),
            sums.counted,
            plus(sums.metrics, values_of(self._state.metrics)),
        )

    def _update_model(self, agreement: StepAgreement, start: RoundStart, sums: Sums) -> None:
        state = self._state

        def mean(value: Tensor, total: Tensor) -> Tensor:
            new = total if self._takes_values else self._wide(value) - total
            return agreement.choose(tf.cast(new, value.dtype), value)

        number = len(state.averaged)
        if self._protection is not None:
            self._protection.follow(sums.averaged[number:], agreement.choose)
        for variable, value, total in zip(
            state.averaged, start.averaged, sums.averaged[:number], strict=True
        ):
            variable.assign(mean(value, total))
        counted = sums.counted
        if self._is_private:  # how much clients have drawn must not show
            counted = [tf.constant([0, SEEDS_OF_ROUND]) for _ in counted]
        for variable, value, added in zip(state.counted, start.counted, counted, strict=True):
            variable.assign(agreement.choose(value + tf.cast(added, value.dtype), value))
        for variable, value, total in zip(
            state.trained, start.trained, sums.trained, strict=True
        ):
            variable.assign(mean(value, total) if self._server is None else value)
        if self._server is not None:
            deltas = [
                tf.cast(total, value.dtype)
                for value, total in zip(start.trained, sums.trained, strict=True)
            ]
            apply = functools.partial(self._apply_server, deltas)
            self._strategy.update(functools.partial(agreement.do, apply))

    def _apply_server(self, deltas: list[Tensor]) -> None:
        with _keras.tracing_part() as part:
            self._server.apply(deltas, list(self._state.trained))
        if not self._is_private:
            return
        read = part.read_besides(deltas, (), self._state.metrics)
        if read is not None:
            raise ArgumentError(
                "With `privacy` of FedAvg the server's optimizer must depend on clients by "
                "their noisy sum alone, and read no loss or metric. Received: "
                f"{read}, which is read. Leave it out."
            )
