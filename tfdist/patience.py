"""A limit to every wait for other workers, since TensorFlow's collectives have none.

TensorFlow notices a worker that died. One that lives and never comes (it returned early, or
hangs in a callback) is noticed here. `CommunicationOptions(timeout_seconds=)` is no way out:
in TensorFlow 2.21 each collective then leaves two threads asleep until the limit is over.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator

STEP_TIMEOUT = "TFDIST_STEP_TIMEOUT"
"""Environment variable: seconds a worker waits for the others, default 1800; 0 for ever."""

EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: start me again


class Patience:
    """Ends the process when one wait takes too long; a wait in a collective cannot be left.

    Args:
        seconds: The limit of a wait; 0 means none.
        worker: Who waits, for the message.
    """

    def __init__(self, seconds: float, worker: str) -> None:
        self._seconds = seconds
        self._worker = worker
        self._since: float | None = None
        self._what = ""
        if seconds > 0:
            threading.Thread(target=self._watch, name="tfdist-patience", daemon=True).start()

    @classmethod
    def from_environment(cls, worker: str) -> Patience:
        """Makes one with the limit that the environment sets.

        Args:
            worker: Who waits.
        """
        return cls(float(os.environ.get(STEP_TIMEOUT, "1800")), worker)

    @contextlib.contextmanager
    def waiting_for(self, what: str) -> Iterator[None]:
        """Limits the time that the context lasts.

        Args:
            what: Named in the message.
        """
        self._what, self._since = what, time.monotonic()
        try:
            yield
        finally:
            self._since = None

    def _watch(self) -> None:
        while True:
            time.sleep(min(5.0, self._seconds / 4))
            since = self._since
            if since is not None and time.monotonic() - since > self._seconds:
                self._give_up()

    def _give_up(self) -> None:
        print(
            f"tfdist: {self._worker} waited more than {self._seconds:g} s for {self._what}. "
            "Another worker did not come to it: it may have left `fit` early, run another "
            "script, or hang in a callback or in reading data. See its output. If a step "
            f"really takes so long, set {STEP_TIMEOUT} to more seconds.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_STATUS)
