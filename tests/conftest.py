"""Signals as a shell's foreground has them, wherever the tests were started.

What runs in the background or under nohup ignores some, and so would the launchers that the
tests start and interrupt.
"""

from __future__ import annotations

import gc
import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
for _number in (signal.SIGHUP, signal.SIGQUIT):
    signal.signal(_number, signal.SIG_DFL)


def pytest_collection_finish() -> None:
    """Leaves what was imported out of every garbage collection to come."""
    gc.freeze()
