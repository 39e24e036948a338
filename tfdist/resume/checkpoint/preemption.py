"""Signals to a training with checkpoints: it saves after the current step, and ends or goes on.

SIGTERM saves and ends. SIGUSR1 and SIGUSR2, by which schedulers warn of the end, save.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from tfdist.cluster import heartbeat
from tfdist.cluster.warning_signals import ON_WARNING, PREEMPT_STATUS, WARNINGS, is_free
from tfdist.errors import START_ME_AGAIN, Preempted

if TYPE_CHECKING:
    from tfdist.step.signals import StopState

# A scheduler may signal a worker and also its launcher, which passes the signal on. Signals
# within this time count as one.
_SAME_SIGNAL_S = 1.0
# Signals in this time after the training is saved are ignored: the process is ending anyway.
_IGNORE_S = 10.0
WARNED = "tfdist: after a warning signal, training is saved and goes on."


class Preemption:
    """Listens for SIGTERM and for warnings. A second SIGTERM ends the process at once.

    A thread listens, since the main thread may wait in a collective.

    Attributes:
        is_requested: Whether SIGTERM has been received, or a warning that ends the training.
        is_warned: Whether a warning was received for which nothing was saved yet.
        on_request: Called when a signal is received, from any thread.
        is_leaving: Whether the training is saved and the process is ending. Then further
            signals are ignored.
    """

    def __init__(self) -> None:
        self.is_requested = self.is_warned = False
        self.on_request: Callable[[], None] = lambda: None
        self.is_leaving = False
        self._first_signal_time: float | None = None
        self._warned_at = -math.inf

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Listens while the context lasts, if entered in the main thread.

        A warning for which the script has a handler of its own is left to it.
        """
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
        warnings = {n: signal.getsignal(n) for n in WARNINGS if is_free(n)}
        for number in warnings:
            signal.signal(number, lambda number, frame: self._heed_warning(number))
            signal.siginterrupt(number, False)
        original_fd = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        global _process, _handled
        _process, _handled = os.getpid(), (signal.SIGTERM, *warnings)
        heartbeat.here.set_flags(saves=True)
        thread = threading.Thread(
            target=self._listen, args=(reading, warnings), name="tfdist-preemption", daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(original_fd)
            _process = 0
            for number, handler in warnings.items():
                signal.signal(number, handler)
                signal.siginterrupt(number, False)
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
                f"tfdist: {reason}; the run ends with status {_status()}, to be started again.",
                flush=True,
            )
        raise Preempted

    def takes_warning(self, stop: StopState, is_alone: bool) -> bool:
        """Returns whether a checkpoint is due because a worker was warned, once for a warning.

        Args:
            stop: What this worker asks of the others, and what they have agreed on.
            is_alone: Whether there are no other workers.
        """
        if not (stop.warned if is_alone else stop.saving):
            return False
        self.is_warned = stop.warned = stop.saving = False
        return True

    def _listen(self, reading: int, warnings: Collection[int]) -> None:
        while numbers := os.read(reading, 64):
            for number in numbers:
                if self.is_leaving:
                    continue
                if number == signal.SIGTERM:
                    self._handle_signal()
                elif number in warnings:
                    self._heed_warning(number)

    def _heed_warning(self, number: int) -> None:
        if os.environ.get(ON_WARNING) != "end":
            # The main thread and the listening one both come here, in any order.
            now = time.monotonic()
            if now - self._warned_at > _SAME_SIGNAL_S:
                self._warned_at, self.is_warned = now, True
                self.on_request()
        elif not self.is_requested:
            self._request()
            _print_ending(number)

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
            _print_ending(signal.SIGTERM)


def _print_ending(number: int) -> None:
    print(
        f"tfdist: {signal.Signals(number).name}: when this step is made, training is saved and "
        f"ends with status {_status()}. A second SIGTERM ends it at once.",
        file=sys.stderr,
        flush=True,
    )


def _status() -> str:
    return os.environ.get(PREEMPT_STATUS, str(START_ME_AGAIN))


def _ignoring_for_a_while(original: Any) -> Callable[[int, Any], None]:
    begin = time.monotonic()

    def handle(number: int, frame: Any) -> None:
        if time.monotonic() - begin > _IGNORE_S:  # the script has caught `Preempted`, and runs
            signal.signal(signal.SIGTERM, original or signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)

    return handle


_process = 0  # the process that listens
_handled: tuple[int, ...] = ()  # to these signals


def _stop_listening_in_child() -> None:
    """Removes the handlers in a forked child, whose signals are not its parent's."""
    if _process == os.getppid():
        signal.set_wakeup_fd(-1)
        for number in _handled:
            signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_stop_listening_in_child)
