"""Standard streams that are closed, as some daemons and `<&-` leave them."""

from __future__ import annotations

import os
import sys


def open_standard_streams() -> None:
    """Opens closed standard streams on /dev/null.

    Otherwise the next file or pipe that is opened would get the number of one of them: a worker
    would then read its own lifeline as its input, or print into a socket.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            fd = os.open(os.devnull, os.O_RDWR)
            if fd != number:
                os.dup2(fd, number)
                os.close(fd)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115, for the process
