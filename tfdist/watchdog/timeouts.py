"""A timeout for every wait for other workers: TensorFlow's collectives have none.

TensorFlow notices a worker that died. It does not notice a worker that lives but never
arrives, because it returned early or hangs in a callback. `WaitLimit` does.
`CommunicationOptions(timeout_seconds=)` does not help: in TensorFlow 2.21 each collective
then leaves two sleeping threads behind until its timeout is over.
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
"""Environment variable: seconds a worker waits for the others; default 1800, 0 for no limit."""

_LONG_S = 60.0
_PAUSE_S = 5.0
_PREPARING = "preparing"


class WaitLimit:
    """Ends the process when a wait takes too long: a wait in a collective cannot be stopped.

    It first warns, after a quarter of the limit and at most 60 s. Each warning doubles that
    time, so that a run with long steps gets few warnings.

    The time counts from when the process really waits for others. While it traces or
    compiles a step, or waits for its data, the time does not count, and the others read that.

    Args:
        seconds: The limit of a wait; 0 for no limit.
        worker: The name of this worker, for the message.
        store: The key-value store in which workers write what they wait for, or None.
        number: This worker's number in the store.
        absent: Returns the names of the processes that do not answer now.
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
        self._last_text = ""
        self._since: float | None = None
        self._last_busy = 0.0  # when this process was last seen tracing or reading data
        self._name = ""
        self._warn_after = min(_LONG_S, seconds / 4) if seconds > 0 else _LONG_S
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
        """Makes a `WaitLimit` with the limit of the environment variable.

        Args:
            worker: The name of this worker.
            store: The key-value store in which workers write what they wait for, or None.
            number: This worker's number in the store.
            absent: Returns the names of the processes that do not answer now.
        """
        return cls(limit_of(STEP_TIMEOUT, 1800), worker, store, number, absent)

    @contextlib.contextmanager
    def waiting_for(self, name: str) -> Iterator[None]:
        """Limits the time that the context lasts.

        Args:
            name: The name of the wait, for the message.
        """
        self._name, self._since, self._last_busy = name, time.monotonic(), 0.0
        try:
            yield
        finally:
            self._since = None

    def _watch(self) -> None:
        pause = min(_PAUSE_S, self._warn_after / 4)
        while True:
            time.sleep(pause)
            since = self._since
            if since is None:
                self._write("after")
                continue
            if _is_preparing():
                self._last_busy = time.monotonic()
                self._write(_PREPARING)
                continue
            self._write("in")
            waited = time.monotonic() - max(since, self._last_busy)
            if 0 < self._seconds < waited:
                self._give_up()
            if waited > self._warn_after and since != self._warned:
                self._warn(waited)
                self._warned = since
                self._warn_after *= 2

    def _write(self, where: str) -> None:
        text = f"{where} {self._name}" if self._name else "before its first exchange"
        if self._store is not None and text != self._last_text:
            self._store.post(f"progress/{self._number}", text)
            self._last_text = text

    def _read_progress(self) -> dict[int, str]:
        return {} if self._store is None else self._store.read_all("progress")

    def _describe_peers(self, progress: Mapping[int, str]) -> str:
        absent = self._absent()
        kind = self._worker.split()[0]
        others = "; ".join(f"{kind} {i} is {text}" for i, text in sorted(progress.items()))
        return (f"By what they last wrote, {others}. " if others else "") + (
            f"{' and '.join(absent)} did not answer just now. " if absent else ""
        )

    def _warn(self, waited: float) -> None:
        end = f"at {self._seconds:g} s" if self._seconds > 0 else "never"
        progress = self._read_progress()
        others = [text for i, text in progress.items() if i != self._number]
        # Tracing a large model takes minutes, so that is not worth a warning.
        peers_prepare = any(text.startswith(_PREPARING) for text in others)
        print(
            f"tfdist: {'' if peers_prepare else 'warning: '}{self._worker} has waited "
            f"{waited:.0f} s for {self._name}"
            + (
                ", which others still trace or compile, or read data for. "
                if peers_prepare
                else ". "
            )
            + f"{self._describe_peers(progress)}The wait is given up {end} ({STEP_TIMEOUT}).",
            file=sys.stderr,
            flush=True,
        )

    def _give_up(self) -> None:
        print(
            f"tfdist: {self._worker} waited more than {self._seconds:g} s for {self._name}. "
            f"{self._describe_peers(self._read_progress())}"
            "Another worker did not come to it: it may have left `fit` early, run another "
            "script, or hang in a callback or in reading data. See its output. If a step "
            f"really takes so long, set {STEP_TIMEOUT} to more seconds.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(START_ME_AGAIN)


def _is_preparing() -> bool:
    """Returns whether this process still traces a step or waits for its data."""
    with contextlib.suppress(Exception):  # an error must not end the watching thread
        return here.waits_for_data or stacks.is_tracing(stacks.main_frame())
    return False
