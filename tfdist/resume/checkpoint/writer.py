"""Writes checkpoints while training goes on, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from tfdist import watchdog


class Writer:
    """Writes checkpoints in a thread."""

    def __init__(self) -> None:
        # One thread, so that checkpoints reach the disk in the order of training.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tfdist-checkpoint")
        self._writing: Future[None] | None = None

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
