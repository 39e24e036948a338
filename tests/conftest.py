"""What the processes that tests start inherit: signals, and where they import from.

Signals are those of a shell's foreground: what runs in the background or under nohup ignores
some, and so would the launchers that the tests start and interrupt.
"""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path

signal.signal(signal.SIGINT, signal.default_int_handler)
for _number in (signal.SIGHUP, signal.SIGQUIT):
    signal.signal(_number, signal.SIG_DFL)

_tests = Path(__file__).parent
_imports = [str(_tests / "lean"), str(_tests.parent), os.environ.get("PYTHONPATH")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, _imports))


def pytest_collection_finish() -> None:
    """Leaves what was imported out of every garbage collection to come."""
    gc.freeze()
