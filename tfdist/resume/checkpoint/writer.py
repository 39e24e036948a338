"""Writes checkpoints while training goes on, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from tfdist import watchdog


class Writer:
    """A thread that writes."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tfdist-checkpoint")
        self._writing: Future[None] | None = None

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being written."""
        return self._writing is None or self._writing.done()

    def begin(self, write: Callable[[], None]) -> None:
        """Begins to write; `finish` must have been called since the last time.

        Args:
            write: Writes a checkpoint.
        """
        self._writing = self._pool.submit(write)

    @watchdog.here.while_doing(watchdog.SAVING)
    def finish(self) -> None:
        """Waits for what is being written.

        Raises:
            CheckpointError: It could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Ends the thread, when it has written."""
        self._pool.shutdown()
