"""Elastic training: it continues from the last commit when processes join or leave.

A commit is a copy of the state, with its position. Every process commits after each step. If a
process is lost, the others leave Keras's loop, restore the last commit, connect to the
processes that are there now, and enter the loop again at that position. The sampler is a
function of the step, so no example is lost or repeated. (After Horovod's elastic states.)
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import keras
import tensorflow as tf

from tfdist import _keras
from tfdist.data import DataPosition, Source
from tfdist.errors import ArgumentError, MembersChanged, PeerError, StrategyError
from tfdist.resume.position import ContinuedCallbacks, Position
from tfdist.step.prepared import PreparedModel
from tfdist.step.signals import StopState
from tfdist.step.state import TrainState
from tfdist.strategies.base import Strategy
from tfdist.training.callback_kinds import is_history
from tfdist.training.extension import Begins, Continuation, Extension
from tfdist.training.request import Request

_numbers = itertools.count(1)


class ElasticRun(Continuation):
    """One `fit` of an elastic run, from the first attempt to the last.

    Args:
        strategy: The strategy that connects the processes.
        others: As in `Continuation`.

    Attributes:
        position: The position of the last commit. None before the first commit.
        seed: The sampler's seed, the same on all processes.
    """

    needs_state = True

    def __init__(self, strategy: Strategy, others: Sequence[Extension] = ()) -> None:
        super().__init__(others)
        self.position: Position | None = None
        self.seed = 0
        self._number = next(_numbers)
        self._strategy = strategy
        self._state = TrainState(())
        self._committed: Sequence[Any] = ()
        self._copy_state: Callable[[], Sequence[Any]] = tuple
        self._stop = StopState()
        self._steps: int | None = None
        self._data_position: Callable[[], DataPosition] = DataPosition
        self._begun_callbacks: dict[int, Any] = {}

    def choose(self, request: Request) -> Request:
        """Joins the other processes, and takes their seed."""
        assert request.seed is not None
        self.seed = request.seed
        self._join()
        return replace(super().choose(request), seed=self.seed)

    def bind(self, request: Request, source: Source) -> None:
        """Checks that the data can be read several times."""
        if not source.repeatable:
            raise ArgumentError(
                "`x` must be data that can be drawn again in an elastic run. Received: a "
                "generator. Pass arrays, a tf.data.Dataset or a keras.utils.PyDataset."
            )

    def begin_attempt(self, source: Source) -> None:
        """Resets the data, so that this process reads it like one that has just joined."""
        source.begin_anew()

    def train(self, attempt: Callable[[], Any]) -> Any:
        """Trains until an attempt completes.

        Args:
            attempt: Trains from `position` on. Returns Keras's `History`.
        """
        with self._strategy.members_watched(self._note_change):
            while True:
                try:
                    return self._agree_on(attempt())
                except (PeerError, MembersChanged) as reason:
                    message = f"tfdist: {reason} Training goes on."
                    if self._state.per_replica:
                        predicate = "were lost" if isinstance(reason, PeerError) else "leave"
                        message += (
                            " What compression had kept back to send later is lost for "
                            f"processes that {predicate}."
                        )
                    print(message, file=sys.stderr, flush=True)
                    # The step that failed may have changed some variables, and one process may
                    # have completed it when another has not. So each process returns to its
                    # last commit. `_join` takes the first rank's position, and the next attempt
                    # its state.
                    if self.position is not None:
                        for variable, value in zip(
                            self._state.variables, self._committed, strict=True
                        ):
                            variable.assign(value)
                    self._strategy.reconnect()
                    self._join()

    def _agree_on(self, history: Any) -> Any:
        """Gives every process the chief's state and history.

        The history of a process that joined late lacks the first epochs.
        """
        self._strategy.agree(self._state.replicated)
        chiefs_history = self._strategy.broadcast_object((history.epoch, history.history))
        history.epoch, history.history = chiefs_history
        return history

    def begin(self, epoch: int, start: Callable[[], DataPosition]) -> Begins:
        """Returns where an attempt begins.

        Args:
            epoch: The epoch of the first attempt.
            start: As in `Continuation.begin`.

        Returns:
            As in `Continuation.begin`. The logs are empty: a commit never follows the last
            step of an epoch, so a later step has logs.
        """
        if self.position is not None:
            epoch, step, data_position = self.position
            return epoch, step, lambda: data_position, {}
        return epoch, 0, start, {}

    def note_step(self, step: int) -> None:
        """Commits after a step, except the last of an epoch: `begin_epoch` commits next.

        Args:
            step: Number of completed steps of the epoch.
        """
        if step != self._steps and self.position is not None:
            self.commit(self.position._replace(step=step))

    def loop_callbacks(
        self,
        callbacks: Sequence[Any],
        prepared: PreparedModel,
        *,
        where: Callable[[], DataPosition],
        **options: Any,
    ) -> Any:
        """Makes the `CallbackList` of an attempt.

        A callback that has begun in an earlier attempt does not begin again.

        Args:
            callbacks: This process's callbacks.
            prepared: The model. A commit copies its state.
            where: Returns the position of the data, between two epochs.
            **options: Arguments of `keras.callbacks.CallbackList`.
        """
        self._data_position, self._steps, self._stop = where, options["steps"], prepared.stop
        self._state, variables = prepared.state, prepared.state.variables
        if self._state.sharded:
            raise ArgumentError(
                "In an elastic run each process must have all state, since any may be lost. "
                f"Received: the sharded variable {self._state.sharded[0][0].path!r}. Use "
                "`checkpoint`, and restarts of `tfdist run`."
            )
        self._copy_state = tf.function(
            lambda: [tf.identity(v.value) for v in variables], autograph=False
        )
        # The `History` of the first attempt goes on, since Keras makes a new one for each.
        history = [c for c in self._begun_callbacks.values() if is_history(c)]
        all_callbacks = _AttemptCallbacks(
            [*callbacks, *history, _Commits(self)], add_history=True, **options
        )
        all_callbacks.begun_callbacks = self._begun_callbacks
        all_callbacks.steps_made = 0 if self.position is None else self.position.step
        return all_callbacks

    def commit(self, position: Position) -> None:
        """Copies the state, with its position.

        Args:
            position: The position.
        """
        # The state comes first. If its copy fails, the position must not be ahead of it.
        self._committed = self._copy_state()
        self.position = position

    def begin_epoch(self, epoch: int) -> None:
        """Commits at the beginning of an epoch, unless an earlier attempt has begun it.

        Args:
            epoch: The epoch, as Keras counts.
        """
        if self.position is None or self.position.epoch != epoch:
            self.commit(Position(epoch, 0, self._data_position()))

    def _join(self) -> None:
        # A process that joins has no position yet. It takes all of this from the first rank,
        # which is why the first rank must be an old one.
        self._strategy.join()
        states = self._strategy.gather_objects((self.position, self.seed, self._number))
        if states[0][0] is None and any(position is not None for position, *_ in states):
            raise StrategyError(
                "The first rank must be one that was training. Received: a new one. Start "
                "the job again, from a checkpoint."
            )
        self.position, self.seed, number = states[0]
        if number != self._number:
            raise StrategyError(
                "A process that joins an elastic run must find it in the same `fit`. "
                f"Received: number {number} there, number {self._number} here. Train in one "
                "`fit`."
            )

    def _note_change(self) -> None:
        self._stop.members_changed = True


class _AttemptCallbacks(ContinuedCallbacks):
    """Callbacks of which some have begun in an earlier attempt, by their ids."""

    begun_callbacks: dict[int, Any]

    def on_train_begin(self, logs: Any = None) -> None:
        all_callbacks = self.callbacks
        self.callbacks = [c for c in all_callbacks if id(c) not in self.begun_callbacks]
        self.begun_callbacks.update((id(c), c) for c in self.callbacks)
        super().on_train_begin(logs)
        self.callbacks = all_callbacks


class _Commits(keras.callbacks.Callback):  # type: ignore[misc]
    """Commits at the beginning of an epoch, and restores the metrics of an interrupted one."""

    def __init__(self, run: ElasticRun) -> None:
        super().__init__()
        self._run = run
        self._metric_values: list[tuple[Any, Any]] = []

    def on_train_begin(self, logs: Any = None) -> None:
        # Keras's loop resets the metrics when the epoch begins, after this.
        if self._run.position is not None and self._run.position.step:
            metrics = _keras.metric_variables(self.model)
            self._metric_values = [(variable, variable.numpy()) for variable in metrics]

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        for variable, value in self._metric_values:
            variable.assign(value)
        self._metric_values = []
        self._run.begin_epoch(epoch)
