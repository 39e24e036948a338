"""Changes for a while what a program does on signals that end it, or warn it of the end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from tfdist.cluster.warning_signals import WARNINGS

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Received(list[int]):
    """The signals that ask the launcher to end, in their order.

    Attributes:
        warnings: Warning signals that are to be passed on to the workers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.warnings: list[int] = []


@contextmanager
def collecting(warnings_end: bool = False) -> Iterator[Received]:
    """Collects the signals that usually end a program, while the context lasts.

    Args:
        warnings_end: Whether a warning signal asks to end, too.
    """
    received = Received()

    def collect(number: int, frame: FrameType | None) -> None:
        is_passed_on = number in WARNINGS and not warnings_end
        (received.warnings if is_passed_on else received).append(number)

    with handling((*_ENDING, *WARNINGS), collect):
        yield received


@contextmanager
def handling(
    numbers: Sequence[int], handler: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
    """Handles signals while the context lasts; does nothing outside of the main thread.

    Args:
        numbers: The signals. An ignored signal stays ignored, such as SIGHUP under nohup.
        handler: The handler, as in `signal.signal`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers_before = {
        n: signal.getsignal(n) for n in numbers if signal.getsignal(n) != signal.SIG_IGN
    }
    for number in handlers_before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, handler_before in handlers_before.items():
            signal.signal(number, handler_before)
