"""Handles SIGTERM in a training with checkpoints: it saves after the current step, and ends."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from tfdist.cluster import heartbeat
from tfdist.errors import START_ME_AGAIN, Preempted

# A scheduler may signal a worker and also its launcher, which passes the signal on. Signals
# within this time count as one.
_SAME_SIGNAL_S = 1.0
# Signals in this time after the training is saved are ignored: the process is ending anyway.
_IGNORE_S = 10.0


class Preemption:
    """Listens for SIGTERM. A second SIGTERM ends the process at once.

    A thread listens, since the main thread may wait in a collective.

    Attributes:
        is_requested: Whether SIGTERM has been received.
        on_request: Called when it is received, from any thread.
        is_leaving: Whether the training is saved and the process is ending. Then further
            signals are ignored.
    """

    def __init__(self) -> None:
        self.is_requested = False
        self.on_request: Callable[[], None] = lambda: None
        self.is_leaving = False
        self._first_signal_time: float | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Listens for SIGTERM while the context lasts, if entered in the main thread."""
        # `getsignal` returns None for a handler that is not Python's, such as TensorFlow's.
        original = signal.getsignal(signal.SIGTERM)
        is_main = threading.current_thread() is threading.main_thread()
        if not is_main or original == signal.SIG_IGN:
            yield
            return
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        # Python calls this handler in the main thread, as soon as that runs Python code. So a
        # signal between two steps takes effect in the next step, even if the listening thread
        # is late.
        signal.signal(signal.SIGTERM, lambda number, frame: self._request())
        original_fd = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
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
            signal.set_wakeup_fd(original_fd)
            _process = 0
            if self.is_leaving:
                signal.signal(signal.SIGTERM, _ignoring_for_a_while(original))
            else:
                signal.signal(signal.SIGTERM, original or signal.SIG_DFL)
                heartbeat.here.set_flags()
            os.close(writing)
            thread.join()
            os.close(reading)

    def leave(self, reason: str | None) -> NoReturn:
        """Ends the training, which is saved now.

        Args:
            reason: The beginning of a line for the user; None on workers that say nothing.

        Raises:
            Preempted: Always.
        """
        self.is_leaving = True
        heartbeat.here.set_flags(saves=True, preempted=True)
        if reason is not None:
            print(
                f"tfdist: {reason}; the run ends with status {START_ME_AGAIN}, to be started "
                "again.",
                flush=True,
            )
        raise Preempted

    def _listen(self, reading: int) -> None:
        while numbers := os.read(reading, 64):
            for number in numbers:
                if number == signal.SIGTERM and not self.is_leaving:
                    self._handle_signal()

    def _request(self) -> None:
        self.is_requested = True
        self.on_request()

    def _handle_signal(self) -> None:
        now = time.monotonic()
        first = self._first_signal_time
        is_second = first is not None and now - first > _SAME_SIGNAL_S
        if is_second or heartbeat.here.must_end:
            os._exit(128 + signal.SIGTERM)
        self._request()
        if first is None:
            self._first_signal_time = now
            print(
                "tfdist: SIGTERM: when this step is made, training is saved and ends with "
                f"status {START_ME_AGAIN}. A second SIGTERM ends it at once.",
                file=sys.stderr,
                flush=True,
            )


def _ignoring_for_a_while(original: Any) -> Callable[[int, Any], None]:
    begin = time.monotonic()

    def handle(number: int, frame: Any) -> None:
        if time.monotonic() - begin > _IGNORE_S:  # the script has caught `Preempted`, and runs
            signal.signal(signal.SIGTERM, original or signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)

    return handle


_process = 0  # the process that listens


def _stop_listening_in_child() -> None:
    """Removes the handlers in a forked child, whose signals are not its parent's."""
    if _process == os.getppid():
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=_stop_listening_in_child)
