"""The callbacks of a training with checkpoints."""

from __future__ import annotations

from typing import Any, Protocol

from tfdist.resume.checkpoint.callbacks import Memory
from tfdist.resume.position import ContinuedCallbacks


class CheckpointedRun(Protocol):
    """What puts state back, and saves it; see `CheckpointRun`."""

    def restore(self, memory: Memory) -> None:
        """Puts the state back that belongs to the position."""

    def note_restored(self) -> None:
        """Tells others that the state was put back."""

    def begin_epoch(self, epoch: int, memory: Memory) -> None:
        """Notes that an epoch begins, or the rest of one."""

    def after_step(self, memory: Memory, logs: Any) -> None:
        """Saves, if it is time to."""

    def leave_if_asked(self, memory: Memory, logs: Any) -> None:
        """Saves and leaves, if a worker was asked to."""

    def after_epoch(self, memory: Memory, is_stopped: bool) -> None:
        """Saves the beginning of the next epoch, if it is time to."""


class SavingCallbacks(ContinuedCallbacks):
    """Callbacks whose state is put back at the beginning, and saved after steps and epochs.

    Args:
        run: Saves and puts back.
        made: Steps of the first epoch that were made already.
        callbacks: As in `keras.callbacks.CallbackList`.
        **options: As there.
    """

    def __init__(self, run: CheckpointedRun, made: int, callbacks: Any, **options: Any) -> None:
        super().__init__(callbacks, **options)
        self.made = made
        self._run = run
        self._memory = Memory(self.callbacks)

    def on_train_begin(self, logs: Any = None) -> None:
        """Puts the state back."""
        super().on_train_begin(logs)
        self.model._initial_epoch = None  # BackupAndRestore's; the checkpoint's is passed
        self._memory.note_begun()
        self._run.restore(self._memory)
        self._run.note_restored()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Notes the position."""
        super().on_epoch_begin(epoch, logs)
        self._run.begin_epoch(epoch, self._memory)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Saves, or leaves."""
        super().on_train_batch_end(batch, logs)
        if not self.is_made(batch + 1 - int(self.model.steps_per_execution)):
            self._run.after_step(self._memory, logs)
            if not self.model.stop_training:  # else the end of the epoch is saved
                self._run.leave_if_asked(self._memory, logs)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Saves."""
        super().on_epoch_end(epoch, logs)
        self._run.after_epoch(self._memory, bool(self.model.stop_training))
