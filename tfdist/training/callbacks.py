"""Keras's callbacks on several workers: the chief writes, and all workers stop together."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from tfdist.data.imbalance.per_class import PerClassMetrics
from tfdist.step.signals import StopState
from tfdist.strategies.base import Strategy
from tfdist.training.callback_kinds import is_board, listed, writes
from tfdist.training.learning_rate import LearningRateScaling, RateCallback
from tfdist.training.stragglers import StragglerCallback


def prepare(
    callbacks: Any,
    strategy: Strategy,
    stop: StopState,
    variables: Sequence[Any],
    timers: Any = None,
    shows: bool = False,
) -> Any:
    """Adapts the user's callbacks to this process.

    Callbacks that decide run on every worker: they see the same logs. Callbacks that write
    (`ModelCheckpoint`, `BackupAndRestore`, `CSVLogger`, `TensorBoard` and classes derived
    from them) run on the chief only. Every worker then takes the chief's state, so it gets
    what `BackupAndRestore` has restored.

    Args:
        callbacks: A callback, a list of them, a `CallbackList`, or None.
        strategy: The strategy.
        stop: Shared with the train function.
        variables: The model's state, which all workers take from the chief.
        timers: The step timers, if the steps have any.
        shows: Whether this process prints.

    Returns:
        The value for `callbacks` of `Model.fit`.
    """
    last: list[Any] = []
    users = listed(callbacks)
    if strategy.place.num_workers > 1 and timers is not None and not strategy.elastic:
        boards = [c for c in users if is_board(c)]
        log_dir = boards[0].log_dir if boards and strategy.place.is_chief else None
        last.append(StragglerCallback(strategy, timers, shows, log_dir))
    if strategy.place.num_workers > 1:
        last.append(WorkerAgreement(strategy, stop, variables))
    if isinstance(callbacks, keras.callbacks.CallbackList):
        callbacks.callbacks = [*_for_process(users, strategy), *last]
        return callbacks
    return [*_for_process(users, strategy), *last]


_BETWEEN_STEPS = (
    "on_batch_begin", "on_batch_end", "on_train_batch_begin", "on_train_batch_end"
)  # fmt: skip


def look_between_steps(callbacks: Any) -> bool:
    """Returns whether a callback needs a call at every step.

    Args:
        callbacks: The result of `prepare`.
    """
    return any(map(_looks_between_steps, getattr(callbacks, "callbacks", callbacks)))


def _looks_between_steps(callback: Any) -> bool:
    # Classes whose methods do nothing at a step.
    idle_classes = [keras.callbacks.Callback]
    if getattr(callback, "save_freq", None) == "epoch":
        idle_classes += [keras.callbacks.ModelCheckpoint, keras.callbacks.BackupAndRestore]
    return any(
        getattr(getattr(callback, name), "__func__", None)
        not in [getattr(cls, name) for cls in idle_classes]
        for name in _BETWEEN_STEPS
    )


def _for_process(callbacks: Sequence[Any], strategy: Strategy) -> list[Any]:
    """Selects and orders callbacks: the chief's only if they write, learning rates first.

    A callback that sets the learning rate comes before those that save or restore it.
    """
    selected = [c for c in callbacks if strategy.place.is_chief or not writes(c)]
    for callback in selected:
        if isinstance(callback, RateCallback):
            callback.num_replicas = strategy.place.num_shares
        if isinstance(callback, PerClassMetrics):
            callback.strategy = strategy
    return sorted(
        selected,
        key=lambda c: (not isinstance(c, RateCallback), not isinstance(c, LearningRateScaling)),
    )


def writer_that_calls() -> Any:
    """Returns the callback from which this call comes, if only the chief runs it."""
    frame, writer = inspect.currentframe(), None
    while frame is not None:
        owner = frame.f_locals.get("self")
        if writer is not None and isinstance(owner, keras.callbacks.CallbackList):
            return writer  # Called by Keras, not by the user's own code on every worker.
        writer = owner if writes(owner) else writer
        frame = frame.f_back
    return None


class WorkerAgreement(keras.callbacks.Callback):  # type: ignore[misc]
    """Keeps the workers in agreement. It runs after all other callbacks.

    Args:
        strategy: The strategy.
        stop: Shared with the train function.
        variables: The model's state.
    """

    def __init__(self, strategy: Strategy, stop: StopState, variables: Sequence[Any]) -> None:
        super().__init__()
        self._strategy = strategy
        self._stop = stop
        self._variables = variables

    def on_train_begin(self, logs: Any = None) -> None:
        """Gives every worker the chief's state and initial epoch."""
        self._strategy.agree(self._variables)
        self.model._initial_epoch = self._strategy.broadcast_object(self.model._initial_epoch)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Takes the chief's learning rate."""
        rate = getattr(self.model.optimizer, "learning_rate", None)
        if isinstance(rate, keras.Variable):
            rate.assign(self._strategy.broadcast_object(np.asarray(rate.numpy())))

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Delays a request to stop until all workers know of it."""
        if self.model.stop_training:
            self._stop.requested = True
            self.model.stop_training = False

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Stops all workers if one of them has a request to stop."""
        stops = self.model.stop_training or self._stop.requested or self._stop.agreed
        self.model.stop_training = any(self._strategy.gather_objects(bool(stops)))
