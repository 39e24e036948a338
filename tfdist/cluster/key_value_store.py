"""A key-value store for notes between the workers of a run, which works while they wait.

Workers exchange by collectives, and a collective waits for all. A store is asked from a
background thread, answers while the main thread waits in a collective, and has a limit to
each call. It is for a few short texts: how far a worker is, why it ends.
"""

from __future__ import annotations

import abc
import atexit
import threading
from collections.abc import Callable
from typing import Any

_ASK_S = 5.0
_STUCK_S = 0.2


class KeyValueStore(abc.ABC):
    """Notes by name, seen by all workers; the last one posted under a name counts.

    No call raises or takes longer than seconds: what the store is for must not fail because of
    it. It has no answer when the process that keeps it is stopped or gone.

    Args:
        num_workers: How many workers there are.

    Attributes:
        keeper: The worker whose process keeps it, if one does.
    """

    keeper: int | None = None

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers

    @abc.abstractmethod
    def post(self, name: str, text: str) -> bool:
        """Puts a note in the place of what was there.

        Args:
            name: Of the note, the same on all workers; `"progress/1"`, say.
            text: The note.

        Returns:
            Whether the key-value store has taken it.
        """

    @abc.abstractmethod
    def read(self, name: str) -> str | None:
        """Gives a note, or None where there is none or no answer.

        Args:
            name: Of the note.
        """

    def read_all(self, prefix: str) -> dict[int, str]:
        """Gives the notes that workers posted as `prefix/<worker>`.

        Args:
            prefix: Before the worker's number.

        Returns:
            The notes by worker, of those that posted one.
        """
        notes = {worker: self.read(f"{prefix}/{worker}") for worker in range(self.num_workers)}
        return {worker: note for worker, note in notes.items() if note is not None}


class Limited:
    """Makes calls that may never return, one at a time, and waits for each a while only.

    A call under way when Python ends would crash it: then no other is begun.

    Args:
        seconds: How long to wait for a call.
    """

    def __init__(self, seconds: float = _ASK_S) -> None:
        self._seconds = seconds
        self._free = threading.Lock()
        self._is_stuck = False
        atexit.register(self._free.acquire, timeout=1.0)

    def call(self, function: Callable[[], Any]) -> Any:
        """Gives what a function returns, or None if that takes too long.

        Args:
            function: Must not raise.
        """
        if not self._free.acquire(timeout=_STUCK_S if self._is_stuck else self._seconds):
            return None  # one before has not returned
        answers: list[Any] = []

        def answer() -> None:
            try:
                answers.append(function())
            finally:
                self._is_stuck = False
                self._free.release()
                done.set()

        done = threading.Event()
        threading.Thread(target=answer, name="tfdist-store", daemon=True).start()
        self._is_stuck = not done.wait(self._seconds)
        return answers[0] if answers else None
