"""Writes checkpoints while training goes on, one after the other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from tfdist import watchdog


class Writer:
    """Writes checkpoints in a thread."""

    def __init__(self) -> None:
        # One thread, so that checkpoints reach the disk in the order of training.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tfdist-checkpoint")
        self._writing: Future[None] | None = None
        self._is_given_up = threading.Event()

    @property
    def is_given_up(self) -> bool:
        """Whether the training has failed, so that a write should not wait for others."""
        return self._is_given_up.is_set()

    def give_up(self) -> None:
        """Notes that the training has failed. A write still comes to its end if it can."""
        self._is_given_up.set()

    @property
    def is_idle(self) -> bool:
        """Whether no checkpoint is being written."""
        return self._writing is None or self._writing.done()

    def begin(self, write: Callable[[], None]) -> None:
        """Begins to write. Call `finish` before you call it again.

        Args:
            write: Writes a checkpoint.
        """
        self._writing = self._pool.submit(write)

    @watchdog.here.while_doing(watchdog.SAVING)
    def finish(self) -> None:
        """Waits until the checkpoint is written.

        Raises:
            CheckpointError: The checkpoint could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Waits until the checkpoint is written, and ends the thread."""
        self._pool.shutdown()
