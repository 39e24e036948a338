"""Training that goes on when processes come and go, from the last committed step.

A commit is a copy of the state and the position it belongs to, made after each step on every
process. When one is lost, the others leave Keras's loop, take the state of the last commit,
meet whoever is there, and enter the loop again at that position. The sampler is a function
of the step, so no example is lost or repeated. (After Horovod's elastic states.)
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
from tfdist.step.prepared import Prepared
from tfdist.step.signals import Stop
from tfdist.step.state import TrainState
from tfdist.strategies.base import Strategy
from tfdist.training.extension import Begins, Continuation, Extension
from tfdist.training.request import Request

_numbers = itertools.count(1)


class ElasticRun(Continuation):
    """One `fit` of an elastic run, from the first attempt to the last.

    Args:
        strategy: Connects the processes.
        others: As in `Continuation`.

    Attributes:
        position: Of the last commit; None before the first.
        seed: The sampler's, of all processes.
    """

    needs_state = True

    def __init__(self, strategy: Strategy, others: Sequence[Extension] = ()) -> None:
        super().__init__(others)
        self.position: Position | None = None
        self.seed = 0
        self._number = next(_numbers)
        self._strategy = strategy
        self._state = TrainState(())
        self._kept: Sequence[Any] = ()
        self._copy: Callable[[], Sequence[Any]] = tuple
        self._stop = Stop()
        self._steps: int | None = None
        self._where: Callable[[], DataPosition] = DataPosition
        self._began: dict[int, Any] = {}

    def choose(self, request: Request) -> Request:
        """Joins the others, and takes the seed that they have."""
        assert request.seed is not None
        self.seed = request.seed
        self._join()
        return replace(super().choose(request), seed=self.seed)

    def bind(self, request: Request, source: Source) -> None:
        """Refuses data that cannot be drawn again."""
        if not source.repeatable:
            raise ArgumentError(
                "`x` must be data that can be drawn again in an elastic run. Received: a "
                "generator. Pass arrays, a tf.data.Dataset or a keras.utils.PyDataset."
            )

    def begin_attempt(self, source: Source) -> None:
        """Draws from the data as one that has just come does."""
        source.begin_anew()

    def train(self, attempt: Callable[[], Any]) -> Any:
        """Trains until an attempt comes to its end.

        Args:
            attempt: Trains from `position` on and returns Keras's `History`.
        """
        with self._strategy.members_watched(self._note_change):
            while True:
                try:
                    return self._agreed(attempt())
                except (PeerError, MembersChanged) as reason:
                    said = f"tfdist: {reason} Training goes on."
                    if self._state.per_replica:
                        said += (
                            " What processes that are gone had kept of their gradients, to "
                            "send it later, is lost."
                        )
                    print(said, file=sys.stderr, flush=True)
                    if self.position is not None:
                        for variable, value in zip(
                            self._state.variables, self._kept, strict=True
                        ):
                            variable.assign(value)
                    self._strategy.reconnect()
                    self._join()

    def _agreed(self, history: Any) -> Any:
        """Gives all processes the chief's: one that came late has missed the beginning."""
        self._strategy.agree(self._state.replicated)
        said = self._strategy.broadcast_object((history.epoch, history.history))
        history.epoch, history.history = said
        return history

    def begin(self, epoch: int, start: Callable[[], DataPosition]) -> Begins:
        """Says where an attempt begins.

        Args:
            epoch: Where the first one does.
            start: Says where its data begins, once callbacks have begun.

        Returns:
            The epoch, the steps made of it, what says where its data began, and the logs of
            the last step made, which is never an epoch's last.
        """
        if self.position is not None:
            epoch, step, where = self.position
            return epoch, step, lambda: where, {}
        return epoch, 0, start, {}

    def note_step(self, step: int) -> None:
        """Commits after a step, but for an epoch's last: the next epoch's beginning is.

        Args:
            step: Steps made of the epoch.
        """
        if step != self._steps and self.position is not None:
            self.commit(self.position._replace(step=step))

    def loop_callbacks(
        self,
        given: Sequence[Any],
        prepared: Prepared,
        *,
        where: Callable[[], DataPosition],
        **options: Any,
    ) -> Any:
        """Makes the `CallbackList` of an attempt: what began in an earlier one goes on.

        Args:
            given: This process's callbacks.
            prepared: The model, whose state a commit keeps.
            where: Says where the data stands, between two epochs.
            **options: Of `keras.callbacks.CallbackList`.
        """
        self._where, self._steps, self._stop = where, options["steps"], prepared.stop
        self._state, variables = prepared.state, prepared.state.variables
        self._copy = tf.function(
            lambda: [tf.identity(v.value) for v in variables], autograph=False
        )
        history = [c for c in self._began.values() if isinstance(c, keras.callbacks.History)]
        made = _Continued([*given, *history, _Commits(self)], add_history=True, **options)
        made.began = self._began
        made.made = 0 if self.position is None else self.position.step
        return made

    def commit(self, position: Position) -> None:
        """Keeps the state that belongs to a position.

        Args:
            position: Where training stands.
        """
        self._kept = self._copy()
        self.position = position

    def begin_epoch(self, epoch: int) -> None:
        """Commits at the beginning of an epoch, unless this is the rest of one.

        Args:
            epoch: As Keras counts.
        """
        if self.position is None or self.position.epoch != epoch:
            self.commit(Position(epoch, 0, self._where()))

    def _join(self) -> None:
        self._strategy.join()
        said = self._strategy.gather_objects((self.position, self.seed, self._number))
        if said[0][0] is None and any(position is not None for position, *_ in said):
            raise StrategyError(
                "The first rank must be one that was training. Received: a new one. Start "
                "the job again, from a checkpoint."
            )
        self.position, self.seed, number = said[0]
        if number != self._number:
            raise StrategyError(
                "A process that joins an elastic run must find it in the same `fit`. "
                f"Received: number {number} there, number {self._number} here. Train in one "
                "`fit`."
            )

    def _note_change(self) -> None:
        self._stop.members_changed = True


class _Continued(ContinuedCallbacks):
    """Callbacks of which some have begun in an earlier attempt."""

    began: dict[int, Any]

    def on_train_begin(self, logs: Any = None) -> None:
        everyone = self.callbacks
        self.callbacks = [c for c in everyone if id(c) not in self.began]
        self.began.update((id(c), c) for c in self.callbacks)
        super().on_train_begin(logs)
        self.callbacks = everyone


class _Commits(keras.callbacks.Callback):  # type: ignore[misc]
    """Commits at the beginning of an epoch; brings back the metrics of a broken one."""

    def __init__(self, run: ElasticRun) -> None:
        super().__init__()
        self._run = run
        self._counted: list[tuple[Any, Any]] = []

    def on_train_begin(self, logs: Any = None) -> None:
        if self._run.position is not None and self._run.position.step:
            metrics = _keras.metric_variables(self.model)
            self._counted = [(variable, variable.numpy()) for variable in metrics]

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        for variable, value in self._counted:
            variable.assign(value)
        self._counted = []
        self._run.begin_epoch(epoch)
