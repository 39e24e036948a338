"""Changes for a while what a program does on signals that end it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType


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
