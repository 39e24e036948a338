"""Keras's callbacks on several workers: one writes, all decide the same, at the same step."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from tfdist.imbalance.per_class import PerClassMetrics
from tfdist.step.signals import Stop
from tfdist.strategies.base import Strategy
from tfdist.training.learning_rate import LearningRateScaling, RateCallback
from tfdist.training.stragglers import StragglerCallback

_WRITERS = tuple(
    getattr(keras.callbacks, name)
    for name in (
        "BackupAndRestore",
        "CSVLogger",
        "ModelCheckpoint",
        "OrbaxCheckpoint",
        "RemoteMonitor",
        "TensorBoard",
    )
    if hasattr(keras.callbacks, name)
)


def prepare(
    callbacks: Any,
    strategy: Strategy,
    stop: Stop,
    variables: Sequence[Any],
    timers: Any = None,
    shows: bool = False,
) -> Any:
    """Makes the user's callbacks right for this process.

    Every worker runs the callbacks that decide: they see the same logs. Those that write
    (`ModelCheckpoint`, `BackupAndRestore`, `CSVLogger`, `TensorBoard` and classes derived
    from them) run on the chief alone; what `BackupAndRestore` restores there, every worker
    gets.

    Args:
        callbacks: A callback, a list of them, a `CallbackList`, or None.
        strategy: Where the replicas are.
        stop: Shared with the train function.
        variables: The model's state, which all workers take from the chief.
        timers: Clocks inside of the steps, if they have some.
        shows: Whether this process prints.

    Returns:
        What `Model.fit` takes as `callbacks`.
    """
    last: list[Any] = []
    given = getattr(callbacks, "callbacks", callbacks)
    given = [
        c for c in (given if isinstance(given, list | tuple) else [given]) if c is not None
    ]
    if strategy.place.num_workers > 1 and timers is not None and not strategy.elastic:
        boards = [c for c in given if isinstance(c, keras.callbacks.TensorBoard)]
        log_dir = boards[0].log_dir if boards and strategy.place.is_chief else None
        last.append(StragglerCallback(strategy, timers, shows, log_dir))
    if strategy.place.num_workers > 1:
        last.append(WorkerAgreement(strategy, stop, variables))
    if isinstance(callbacks, keras.callbacks.CallbackList):
        callbacks.callbacks = [*_for_process(given, strategy), *last]
        return callbacks
    return [*_for_process(given, strategy), *last]


_BETWEEN_STEPS = (
    "on_batch_begin", "on_batch_end", "on_train_batch_begin", "on_train_batch_end"
)  # fmt: skip


def look_between_steps(callbacks: Any) -> bool:
    """Tells whether a callback is told of every step.

    Args:
        callbacks: What `prepare` gave.
    """
    return any(map(_looks_between_steps, getattr(callbacks, "callbacks", callbacks)))


def _looks_between_steps(callback: Any) -> bool:
    idle = [keras.callbacks.Callback]
    if getattr(callback, "save_freq", None) == "epoch":
        idle += [keras.callbacks.ModelCheckpoint, keras.callbacks.BackupAndRestore]
    return any(
        getattr(getattr(callback, name), "__func__", None)
        not in [getattr(cls, name) for cls in idle]
        for name in _BETWEEN_STEPS
    )


def _for_process(callbacks: Sequence[Any], strategy: Strategy) -> list[Any]:
    """Leaves writers to the chief; what sets the rate comes before what saves it."""
    kept = [c for c in callbacks if strategy.place.is_chief or not _writes(c)]
    for callback in kept:
        if isinstance(callback, RateCallback):
            callback.num_replicas = strategy.place.num_replicas
        if isinstance(callback, PerClassMetrics):
            callback.strategy = strategy
    return sorted(
        kept,
        key=lambda c: (not isinstance(c, RateCallback), not isinstance(c, LearningRateScaling)),
    )


def _writes(callback: Any) -> bool:
    return isinstance(callback, _WRITERS)


def writer_that_calls() -> Any:
    """Gives the callback that this call comes from, if it is one that the chief alone runs."""
    frame, writer = inspect.currentframe(), None
    while frame is not None:
        owner = frame.f_locals.get("self")
        if writer is not None and isinstance(owner, keras.callbacks.CallbackList):
            return writer  # else somebody calls its methods by hand, maybe on all workers
        writer = owner if isinstance(owner, _WRITERS) else writer
        frame = frame.f_back
    return None


class WorkerAgreement(keras.callbacks.Callback):  # type: ignore[misc]
    """Keeps the workers together; runs after all other callbacks.

    Args:
        strategy: Where the replicas are.
        stop: Shared with the train function.
        variables: The model's state.
    """

    def __init__(self, strategy: Strategy, stop: Stop, variables: Sequence[Any]) -> None:
        super().__init__()
        self._strategy = strategy
        self._stop = stop
        self._variables = variables

    def on_train_begin(self, logs: Any = None) -> None:
        """Starts every worker from the chief's state, whatever it loaded."""
        self._strategy.agree(self._variables)
        self.model._initial_epoch = self._strategy.broadcast_object(self.model._initial_epoch)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Takes the chief's learning rate."""
        rate = getattr(self.model.optimizer, "learning_rate", None)
        if isinstance(rate, keras.Variable):
            rate.assign(self._strategy.broadcast_object(np.asarray(rate.numpy())))

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Holds a request to stop back until all workers know of it."""
        if self.model.stop_training:
            self._stop.requested = True
            self.model.stop_training = False

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Stops everywhere when anyone asked to."""
        asked = self.model.stop_training or self._stop.requested or self._stop.agreed
        self.model.stop_training = any(self._strategy.gather_objects(bool(asked)))
