"""A key-value store that the workers of a run share, and that works while they wait.

Workers exchange gradients by collectives, and a collective waits for all workers. A
background thread can read and write the store while the main thread waits in a collective.
Every call has a time limit. The store is for a few short texts: how far a worker is, why it
ends.
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
    """Texts by name, seen by all workers; the last text posted under a name counts.

    A call never raises and takes seconds at most: a store that fails must not end the
    training. It does not answer when the process that keeps the store is stopped or gone.

    Args:
        num_workers: How many workers there are.

    Attributes:
        keeper: The number of the worker whose process keeps the store, or None.
    """

    keeper: int | None = None

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers

    @abc.abstractmethod
    def post(self, name: str, text: str) -> bool:
        """Stores a text, and replaces an earlier one of the same name.

        Args:
            name: The name, the same on all workers, such as `"progress/1"`.
            text: The text.

        Returns:
            Whether the store has taken the text.
        """

    @abc.abstractmethod
    def read(self, name: str) -> str | None:
        """Returns a text; None if there is no such text, or if the store does not answer.

        Args:
            name: The name under which the text was posted.
        """

    def read_all(self, prefix: str) -> dict[int, str]:
        """Returns the texts that workers posted as `prefix/<worker>`.

        Args:
            prefix: The part of the name before the worker's number.

        Returns:
            The texts by worker; workers without a text are left out.
        """
        texts = {worker: self.read(f"{prefix}/{worker}") for worker in range(self.num_workers)}
        return {worker: text for worker, text in texts.items() if text is not None}


class Limited:
    """Makes calls that may never return, one at a time, with a time limit for each.

    Python would crash if it ended during such a call. So no call begins once Python ends.

    Args:
        seconds: How long to wait for a call.
    """

    def __init__(self, seconds: float = _ASK_S) -> None:
        self._seconds = seconds
        self._free = threading.Lock()
        self._is_stuck = False
        atexit.register(self._free.acquire, timeout=1.0)

    def call(self, function: Callable[[], Any]) -> Any:
        """Returns the function's result, or None if the call takes too long.

        Args:
            function: The function to call; it must not raise.
        """
        # Once a call was too slow, later calls wait only a moment for it to return.
        if not self._free.acquire(timeout=_STUCK_S if self._is_stuck else self._seconds):
            return None  # an earlier call has not returned
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
