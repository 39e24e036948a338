"""The callbacks of a training with checkpoints."""

from __future__ import annotations

from typing import Any, Protocol

from tfdist.resume.checkpoint.callbacks import CallbackState
from tfdist.resume.position import ContinuedCallbacks


class CheckpointedRun(Protocol):
    """Saves and restores the state of a training; see `CheckpointRun`."""

    def restore(self, callback_state: CallbackState) -> None:
        """Restores the state of the checkpoint."""

    def note_restored(self) -> None:
        """Tells the other extensions that the state was restored."""

    def begin_epoch(self, epoch: int, callback_state: CallbackState) -> None:
        """Notes the position at which an epoch, or the rest of one, begins."""

    def after_step(self, callback_state: CallbackState, logs: Any) -> None:
        """Saves, if a checkpoint is due."""

    def leave_if_preempted(self, callback_state: CallbackState, logs: Any) -> None:
        """Saves and ends the process, if a worker has received SIGTERM."""

    def after_epoch(self, callback_state: CallbackState, is_stopped: bool) -> None:
        """Saves the beginning of the next epoch, if a checkpoint is due."""


class SavingCallbacks(ContinuedCallbacks):
    """Callbacks whose state is restored at the beginning, and saved after steps and epochs.

    Args:
        run: Saves and restores.
        steps_made: Number of completed steps of the first epoch.
        callbacks: As in `keras.callbacks.CallbackList`.
        **options: As in `keras.callbacks.CallbackList`.
    """

    def __init__(
        self, run: CheckpointedRun, steps_made: int, callbacks: Any, **options: Any
    ) -> None:
        super().__init__(callbacks, **options)
        self.steps_made = steps_made
        self._run = run
        self._callback_state = CallbackState(self.callbacks)

    def on_train_begin(self, logs: Any = None) -> None:
        """Restores the state, after the callbacks have begun."""
        super().on_train_begin(logs)
        self.model._initial_epoch = None  # of BackupAndRestore; tfdist passes its own
        self._callback_state.note_begun()
        self._run.restore(self._callback_state)
        self._run.note_restored()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Notes the position."""
        super().on_epoch_begin(epoch, logs)
        self._run.begin_epoch(epoch, self._callback_state)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Saves, or ends the process."""
        super().on_train_batch_end(batch, logs)
        if not self.is_completed(batch + 1 - int(self.model.steps_per_execution)):
            self._run.after_step(self._callback_state, logs)
            if not self.model.stop_training:  # else the end of the epoch is saved
                self._run.leave_if_preempted(self._callback_state, logs)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Saves the beginning of the next epoch."""
        super().on_epoch_end(epoch, logs)
        self._run.after_epoch(self._callback_state, bool(self.model.stop_training))
