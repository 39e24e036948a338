"""The signals by which SLURM and others warn that a job is about to end: SIGUSR1, SIGUSR2."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)

ON_WARNING = "TFDIST_ON_WARNING"
"""Environment variable: `end` lets a warning save and end a training, as SIGTERM does."""

PREEMPT_STATUS = "TFDIST_ON_PREEMPT_STATUS"
"""Environment variable: the exit status of a run that was saved, for messages of workers."""


def survive_warnings() -> None:
    """Lets warnings do nothing in a worker, outside of `fit`.

    The launcher has let this process ignore them. That would pass on to programs that a script
    starts, and a handler does not.
    """
    for number in WARNINGS:
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, do_nothing)
            signal.siginterrupt(number, False)


def do_nothing(number: int, frame: FrameType | None) -> None:
    """A handler that does nothing."""


def is_free(number: int) -> bool:
    """Returns whether neither the script nor a library handles a warning.

    Args:
        number: The signal.
    """
    handler = signal.getsignal(number)
    if handler == signal.SIG_DFL:
        return not _is_caught(number)  # a library may have set a handler of its own
    return handler in (signal.SIG_IGN, do_nothing)


def _is_caught(number: int) -> bool:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return False
    masks = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")]
    return any(int(mask, 16) >> (number - 1) & 1 for mask in masks)
