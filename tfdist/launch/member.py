"""A started worker: its process, its output and its heartbeat."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import termios
from contextlib import suppress

from tfdist.cluster.heartbeat import HEARTBEAT_FD, Heartbeat, shared_memory
from tfdist.errors import LaunchError
from tfdist.launch.child import first_steps
from tfdist.launch.detached import RUN, RunName
from tfdist.launch.hidden_output import HiddenOutput
from tfdist.launch.output import LineSplitter, Log, Screen
from tfdist.launch.worker import Worker

LAUNCHER_FD = "TFDIST_LAUNCHER_FD"


class StartedWorker:
    """One started worker."""

    def __init__(
        self,
        position: int,
        worker: Worker,
        process: subprocess.Popen[bytes],
        fd: int,
        lines: LineSplitter,
        is_live: bool,
        heartbeat: Heartbeat,
        hidden_output: HiddenOutput | None,
    ) -> None:
        self.position = position
        self.worker = worker
        self.process = process
        self.fd: int | None = fd
        self.lines = lines
        self.is_live = is_live
        self.heartbeat = heartbeat
        self.hidden_output = hidden_output
        self.ended_at: float | None = None
        self.has_group = True
        self.reason = ""  # why the launcher has killed it

    def signal_group(self, number: int) -> None:
        """Signals the worker and its children, and records when none of them is left."""
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            self.has_group = False
        except PermissionError:
            # macOS answers so for a group of which only zombies are left.
            self.has_group = self.ended_at is None

    def receive(self) -> bytes | None:
        """Returns new output, nothing at its end, and None if there is none now."""
        assert self.fd is not None
        try:
            return os.read(self.fd, 1 << 16)
        except BlockingIOError:
            return None
        except OSError:
            # On Linux, reading a terminal fails so when its last writer has closed it.
            return b""


def start_member(
    position: int,
    worker: Worker,
    screen: Screen,
    lifeline: int,
    run_name: RunName,
    *,
    log: Log | None,
    hidden_output: HiddenOutput | None,
) -> StartedWorker:
    """Starts a worker.

    Args:
        position: Its position among the workers of this machine.
        worker: The worker.
        screen: Shows its lines.
        lifeline: A pipe's reading end, which is at its end once the launcher has died.
        run_name: Names the run in the environment of the worker and of all that it starts.
        log: A file for its whole output, or None.
        hidden_output: Keeps its output if that is not shown, otherwise None.

    Raises:
        LaunchError: The worker could not be started.
    """
    # Only the chief draws a progress bar, and the bar is of use only on a terminal.
    is_live = screen.is_terminal and worker.shows_progress and hidden_output is None
    reading, writing = _terminal(screen) if is_live else os.pipe()
    memory = shared_memory()
    try:
        process = subprocess.Popen(
            worker.command,
            env={
                **worker.environment,
                LAUNCHER_FD: str(lifeline),
                HEARTBEAT_FD: str(memory),
                RUN: str(run_name),
            },
            stdin=subprocess.DEVNULL,
            stdout=writing,
            stderr=writing,
            pass_fds=(lifeline, memory),
            start_new_session=True,
            preexec_fn=first_steps(lifeline),
        )
    except OSError as error:
        os.close(reading)
        os.close(memory)
        raise LaunchError(
            f"The program of {worker.task} must be one that can be started. "
            f"Received: {worker.command[0]!r} ({error.strerror}). "
            "Check that it exists and may be run."
        ) from None
    finally:
        os.close(writing)
    os.set_blocking(reading, False)
    lines = LineSplitter(log, worker.is_quiet)
    heartbeat = Heartbeat.of(memory)
    return StartedWorker(
        position, worker, process, reading, lines, is_live, heartbeat, hidden_output
    )


def _terminal(screen: Screen) -> tuple[int, int]:
    """Opens a pseudo-terminal as wide as the space beside the prefix."""
    outer, inner = pty.openpty()
    settings = termios.tcgetattr(inner)
    settings[1] &= ~termios.OPOST
    termios.tcsetattr(inner, termios.TCSANOW, settings)
    with suppress(OSError):
        rows, columns = termios.tcgetwinsize(sys.stdout.fileno())
        termios.tcsetwinsize(inner, (rows, max(20, columns - screen.prefix_width)))
    return outer, inner
