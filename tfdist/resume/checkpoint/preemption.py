"""SIGTERM while a training is saved: it is heard at once, and heeded when a step is made."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from tfdist.cluster import heartbeat
from tfdist.errors import START_ME_AGAIN

# A scheduler may signal a worker and its launcher, which passes the signal on.
_SAME_S = 1.0
# What comes while a process that has saved ends says nothing new.
_LEAVING_S = 10.0


class Preemption:
    """Whether this process was asked to end; a second SIGTERM ends it at once.

    The signal is heard by a thread: the main thread may wait in a collective.

    Attributes:
        asked: Whether SIGTERM came.
        on_asked: Called then, from any thread.
        is_leaving: Whether all is saved and the process ends: what comes now says nothing new.
    """

    def __init__(self) -> None:
        self.asked = False
        self.on_asked: Callable[[], None] = lambda: None
        self.is_leaving = False
        self._first: float | None = None

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Hears SIGTERM while the context lasts; outside of the main thread it does nothing."""
        # None stands for a handler that is not Python's, as TensorFlow's own.
        usual = signal.getsignal(signal.SIGTERM)
        if threading.current_thread() is not threading.main_thread() or usual == signal.SIG_IGN:
            yield
            return
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        # Python runs this in the main thread when that is free, at the latest; a signal that
        # comes between two steps is heeded by the first of them.
        signal.signal(signal.SIGTERM, lambda number, frame: self._ask())
        before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        global _process
        _process = os.getpid()
        heartbeat.here.set_flags(saves=True)
        thread = threading.Thread(
            target=self._listen, args=(reading,), name="tfdist-preemption", daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            _process = 0
            if self.is_leaving:
                signal.signal(signal.SIGTERM, _ignoring_for_a_while(usual))
            else:
                signal.signal(signal.SIGTERM, usual or signal.SIG_DFL)
                heartbeat.here.set_flags()
            os.close(writing)
            thread.join()
            os.close(reading)

    def leave(self) -> None:
        """Notes that all is saved."""
        self.is_leaving = True
        heartbeat.here.set_flags(saves=True, preempted=True)

    def _listen(self, reading: int) -> None:
        while numbers := os.read(reading, 64):
            for number in numbers:
                if number == signal.SIGTERM and not self.is_leaving:
                    self._hear()

    def _ask(self) -> None:
        self.asked = True
        self.on_asked()

    def _hear(self) -> None:
        now = time.monotonic()
        is_second = self._first is not None and now - self._first > _SAME_S
        if is_second or heartbeat.here.must_end:
            os._exit(128 + signal.SIGTERM)
        self._ask()
        if self._first is None:
            self._first = now
            print(
                "tfdist: SIGTERM: when this step is made, training is saved and ends with "
                f"status {START_ME_AGAIN}. A second SIGTERM ends it at once.",
                file=sys.stderr,
                flush=True,
            )


def _ignoring_for_a_while(usual: Any) -> Callable[[int, Any], None]:
    left = time.monotonic()

    def handle(number: int, frame: Any) -> None:
        if time.monotonic() - left > _LEAVING_S:  # somebody has caught the exit
            signal.signal(signal.SIGTERM, usual or signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)

    return handle


_process = 0


def _forget() -> None:
    """Keeps a forked child's signals from being heard as those of its parent."""
    if _process == os.getppid():
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget)
