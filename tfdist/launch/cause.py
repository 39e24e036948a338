"""Finds the worker whose failure ended the others, and the lines of its output that say why."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field

from tfdist.cluster.heartbeat import WorkerProgress
from tfdist.errors import HUNG, START_ME_AGAIN
from tfdist.launch.worker import Worker
from tfdist.watchdog.diagnosis import HEADLINE

_TRACEBACK = "Traceback (most recent call last):"
# A healthy worker writes one of these when a peer is gone.
_PEER_IS_GONE = re.compile(
    r"UnavailableError|AbortedError|CancelledError|DeadlineExceededError"
    r"|UNAVAILABLE:|ABORTED:|CANCELLED:|DEADLINE_EXCEEDED"
    r"|coordination service|CoordinationService|heartbeat|[Bb]arrier"
    r"|PeerError|Horovod has been shut down|Horovod background loop"
    r"|Connection reset by peer|Socket closed|failed to connect to all addresses"
)
_HINTS = {
    None: " The system does so when memory runs out.",
    True: " Memory ran out: the system has killed a process meanwhile.",
    False: " Memory did not run out: another program or a user has sent it.",
}


@dataclass(frozen=True)
class Failure:
    """The failure of a worker.

    Attributes:
        worker: The worker.
        returncode: Its exit status, or the negative number of the signal that ended it.
        lines: The last lines that it wrote.
        progress: How far the worker was; for a worker that only serves, how far the chief was.
        ended: The time of its end, in seconds since 1970.
        reason: Why the launcher has killed it, in one sentence; empty if it has not.
        memory_ran_out: Whether the system has killed processes of this machine for want of
            memory since the worker started; None if it does not say.
    """

    worker: Worker
    returncode: int
    lines: tuple[str, ...]
    progress: WorkerProgress = field(default_factory=WorkerProgress)
    ended: float = 0.0
    reason: str = ""
    memory_ran_out: bool | None = None

    @property
    def lost_worker(self) -> int | None:
        """The worker whose loss this one has reported as a hang, if it has."""
        return self.progress.lost if self.returncode == HUNG else None

    @property
    def is_from_outside(self) -> bool:
        """Whether something else has ended the worker, which may well happen twice.

        A program does not send itself these signals, but a scheduler does, and a user. If
        memory runs out at a step, it will do so again.
        """
        if self.returncode == -signal.SIGKILL:
            unknown = self.memory_ran_out is None and not self.progress.steps_made
            return unknown or self.memory_ran_out is False
        return self.returncode in (-signal.SIGTERM, -signal.SIGHUP)

    @property
    def status(self) -> int:
        """The exit status a shell would report: 128 + n for signal n."""
        return self.returncode if self.returncode >= 0 else 128 - self.returncode

    @property
    def blames_peer(self) -> bool:
        """Whether the worker only reports that another worker went away."""
        start = _last_traceback(self.lines)
        if start is None:
            return any(_PEER_IS_GONE.search(line) for line in self.lines[-20:])
        # Lines after its own exception, such as TensorFlow's last messages, are not a cause.
        raised = _exception_line(self.lines, start)
        return raised is not None and _PEER_IS_GONE.search(self.lines[raised]) is not None

    def describe(self) -> str:
        """Returns how the worker ended, in one sentence."""
        if self.progress.preempted and self.returncode == START_ME_AGAIN:
            return (
                f"{self.worker.task} has saved its training and ended, after a signal to a "
                f"worker of the run. Exit status {START_ME_AGAIN} asks for a restart."
            )
        if self.reason:
            return self.reason
        if self.lost_worker is not None:
            return (
                f"worker {self.lost_worker} does not answer. {self.worker.task} has reported "
                f"it, and ended with exit status {HUNG}."
            )
        if self.returncode >= 0:
            return f"{self.worker.task} ended with exit status {self.returncode}."
        number = -self.returncode
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = "unknown"
        hint = _HINTS[self.memory_ran_out] if name == "SIGKILL" else ""
        return f"{self.worker.task} was ended by signal {number} ({name}).{hint}"

    @property
    def last_error(self) -> str:
        """The line that names the last exception; empty if there is none."""
        start = _last_traceback(self.lines)
        raised = None if start is None else _exception_line(self.lines, start)
        return "" if raised is None else self.lines[raised]

    def excerpt(self, limit: int = 20) -> tuple[str, ...]:
        """Returns the most useful lines.

        Args:
            limit: The most lines.

        Returns:
            The report of a hang or the last traceback if there is one, otherwise the last
            lines.
        """
        if self.returncode == HUNG and (report := _last_report(self.lines)) is not None:
            return self.lines[report:]
        start = _last_traceback(self.lines)
        if start is None:
            return self.lines[-limit:]
        block = self.lines[start:]
        raised = _exception_line(block, 0)
        if len(block) <= limit or raised is None:
            return block[:limit]
        frames, message = block[1:raised], block[raised + 1 :]
        # TensorFlow's messages run to pages: their end says more than their middle.
        message = _shortened(message, limit // 2)
        return (
            block[0],
            *_shortened(frames, limit - 2 - len(message)),
            block[raised],
            *message,
        )


def root_cause(failures: Sequence[Failure]) -> Failure:
    """Chooses the failure to show.

    Args:
        failures: The workers that failed, in the order in which they ended.

    Returns:
        The first worker that failed by itself; the first of all if each only lost a peer.
    """
    return min(failures, key=lambda failure: failure.blames_peer)


def _shortened(lines: tuple[str, ...], limit: int) -> tuple[str, ...]:
    return lines if len(lines) <= limit else ("  …", *lines[len(lines) - limit + 1 :])


def _last_traceback(lines: Sequence[str]) -> int | None:
    starts = [i for i, line in enumerate(lines) if line.endswith(_TRACEBACK)]
    return starts[-1] if starts else None


def _last_report(lines: Sequence[str]) -> int | None:
    starts = [i for i, line in enumerate(lines) if line.startswith(HEADLINE)]
    return starts[-1] if starts else None


def _exception_line(lines: Sequence[str], start: int) -> int | None:
    for i in range(start + 1, len(lines)):
        if lines[i] and not lines[i].startswith((" ", "+", "|")):
            return i
    return None
