"""What a worker's process does first, before its program."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress

from tfdist.cluster.warning_signals import WARNINGS


def first_steps(lifeline: int) -> Callable[[], None]:
    """Returns a function for `subprocess.Popen(preexec_fn=...)` of a group's first process.

    A warning signal that comes before the worker can handle it is ignored: it would end the
    worker.

    Args:
        lifeline: A pipe's reading end, which is at its end once the launcher has died.
    """

    def prepare() -> None:
        for warning in WARNINGS:
            signal.signal(warning, signal.SIG_IGN)
        if sys.platform == "linux":
            with suppress(OSError):  # without /proc, a thread of the worker does it
                _kill_with_launcher(lifeline)

    return prepare


def _kill_with_launcher(lifeline: int) -> None:
    """Lets the kernel kill this process and its group when the launcher dies.

    The kernel does so also while the process is stopped (SIGSTOP) or holds Python's lock, so
    that it could not notice by itself. PR_SET_PDEATHSIG would leave out its children.

    If the launcher dies before this, this process has the last writing end of the pipe, and the
    start of its program closes that.
    """
    # The signal belongs to an open file, and workers would share the one of the launcher.
    own = os.open(f"/proc/self/fd/{lifeline}", os.O_RDONLY | os.O_NONBLOCK)
    fcntl.fcntl(own, fcntl.F_SETOWN, -os.getpid())
    fcntl.fcntl(own, fcntl.F_SETSIG, int(signal.SIGKILL))
    fcntl.fcntl(own, fcntl.F_SETFL, os.O_ASYNC)  # and no longer O_NONBLOCK
    os.dup2(own, lifeline)
    os.close(own)
