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
from collections.abc import Callable, Iterator, Mapping

from tfdist.cluster.environment import limit_of
from tfdist.cluster.key_value_store import KeyValueStore
from tfdist.errors import START_ME_AGAIN
from tfdist.watchdog import here, stacks

STEP_TIMEOUT = "TFDIST_STEP_TIMEOUT"
"""Environment variable: seconds a worker waits for the others, default 1800; 0 for ever."""

_LONG_S = 60.0
_LOOK_S = 5.0
_PREPARING = "preparing"


class WaitLimit:
    """Ends the process when one wait takes too long; a wait in a collective cannot be left.

    Before, after a quarter of the limit and at most 60 s, it warns of the wait. Each warning
    doubles that time, so that steps which really take long are not warned of each time.

    While this process traces or compiles a step, or its data has not come, it waits for
    nobody: that time does not count, and the others are told.

    Args:
        seconds: The limit of a wait; 0 means none.
        worker: Who waits, for the message.
        store: Where workers write for what they wait, if there is such a place.
        number: This worker's on the store.
        absent: Names the processes that do not answer now.
    """

    def __init__(
        self,
        seconds: float,
        worker: str,
        store: KeyValueStore | None = None,
        number: int = 0,
        absent: Callable[[], list[str]] = list,
    ) -> None:
        self._absent = absent
        self._seconds = seconds
        self._worker = worker
        self._store = store
        self._number = number
        self._written = ""
        self._since: float | None = None
        self._busy = 0.0  # when it was seen last to prepare what it is to wait in
        self._what = ""
        self._long = min(_LONG_S, seconds / 4) if seconds > 0 else _LONG_S
        self._warned: float | None = None
        threading.Thread(target=self._watch, name="tfdist-wait_limit", daemon=True).start()

    @classmethod
    def from_environment(
        cls,
        worker: str,
        store: KeyValueStore | None = None,
        number: int = 0,
        absent: Callable[[], list[str]] = list,
    ) -> WaitLimit:
        """Makes one with the limit that the environment sets.

        Args:
            worker: Who waits.
            store: Where workers write for what they wait.
            number: This worker's on the store.
            absent: Names the processes that do not answer now.
        """
        return cls(limit_of(STEP_TIMEOUT, 1800), worker, store, number, absent)

    @contextlib.contextmanager
    def waiting_for(self, what: str) -> Iterator[None]:
        """Limits the time that the context lasts.

        Args:
            what: Named in the message.
        """
        self._what, self._since, self._busy = what, time.monotonic(), 0.0
        try:
            yield
        finally:
            self._since = None

    def _watch(self) -> None:
        look = min(_LOOK_S, self._long / 4)
        while True:
            time.sleep(look)
            since = self._since
            if since is None:
                self._write("after")
                continue
            if _prepares():
                self._busy = time.monotonic()
                self._write(_PREPARING)
                continue
            self._write("in")
            waited = time.monotonic() - max(since, self._busy)
            if 0 < self._seconds < waited:
                self._give_up()
            if waited > self._long and since != self._warned:
                self._warn(waited)
                self._warned = since
                self._long *= 2

    def _write(self, where: str) -> None:
        note = f"{where} {self._what}" if self._what else "before its first exchange"
        if self._store is not None and note != self._written:
            self._store.post(f"progress/{self._number}", note)
            self._written = note

    def _notes(self) -> dict[int, str]:
        return {} if self._store is None else self._store.read_all("progress")

    def _others(self, notes: Mapping[int, str]) -> str:
        absent = self._absent()
        kind = self._worker.split()[0]
        others = "; ".join(f"{kind} {i} is {note}" for i, note in sorted(notes.items()))
        return (f"By what they last wrote, {others}. " if others else "") + (
            f"{' and '.join(absent)} did not answer just now. " if absent else ""
        )

    def _warn(self, waited: float) -> None:
        end = f"at {self._seconds:g} s" if self._seconds > 0 else "never"
        notes = self._notes()
        others = [note for i, note in notes.items() if i != self._number]
        # A large model is traced for minutes: that is no reason to worry.
        prepared = any(note.startswith(_PREPARING) for note in others)
        print(
            f"tfdist: {'' if prepared else 'warning: '}{self._worker} has waited "
            f"{waited:.0f} s for {self._what}"
            + (
                ", which others still trace or compile, or read data for. "
                if prepared
                else ". "
            )
            + f"{self._others(notes)}The wait is given up {end} ({STEP_TIMEOUT}).",
            file=sys.stderr,
            flush=True,
        )

    def _give_up(self) -> None:
        print(
            f"tfdist: {self._worker} waited more than {self._seconds:g} s for {self._what}. "
            f"{self._others(self._notes())}"
            "Another worker did not come to it: it may have left `fit` early, run another "
            "script, or hang in a callback or in reading data. See its output. If a step "
            f"really takes so long, set {STEP_TIMEOUT} to more seconds.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(START_ME_AGAIN)


def _prepares() -> bool:
    """Tells whether this process is not yet where it waits for the others."""
    with contextlib.suppress(Exception):  # its thread must live
        return here.waits_for_data or stacks.is_tracing(stacks.main_frame())
    return False
