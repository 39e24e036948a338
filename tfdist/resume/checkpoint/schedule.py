"""The steps after which a training saves a checkpoint."""

from __future__ import annotations

import datetime
import time


class SavingSchedule:
    """Tells when the next checkpoint is due.

    Args:
        every: `Checkpoint.every`: a number of steps, a time, or "epoch".
        steps: Number of completed steps when training begins.

    Attributes:
        is_due: Whether a checkpoint is due after the last step.
        is_timed: Whether `every` is a time. Then `is_due` may differ between processes.
        is_each_epoch: Whether a checkpoint is due at the end of each epoch.
    """

    def __init__(self, every: int | str | datetime.timedelta, steps: int) -> None:
        self._every = every
        self.is_timed = isinstance(every, datetime.timedelta)
        self.is_each_epoch = every == "epoch"
        self.is_due = False
        self.note_saved(steps)

    def note_step(self, steps: int) -> None:
        """Updates `is_due`, which stays true until `note_saved`.

        Args:
            steps: Number of completed steps of the training.
        """
        if isinstance(self._every, int):
            # One execution may take several steps, and jump over a multiple of `every`.
            self.is_due |= steps // self._every > self._saved_steps // self._every
        elif isinstance(self._every, datetime.timedelta):
            seconds = time.monotonic() - self._saved_time
            self.is_due |= seconds >= self._every.total_seconds()

    def request(self) -> None:
        """Makes a checkpoint due, whatever `every` says."""
        self.is_due = True

    def note_saved(self, steps: int) -> None:
        """Begins to wait for the next checkpoint.

        Args:
            steps: Number of completed steps that the last checkpoint contains.
        """
        self._saved_steps, self._saved_time = steps, time.monotonic()
        self.is_due = False

    def has_saved(self, steps: int) -> bool:
        """Returns whether the last checkpoint contains exactly these steps.

        Args:
            steps: Number of completed steps of the training.
        """
        return self._saved_steps == steps
