"""Runs the workers from start to end: success, a failure, or a signal to the launcher."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from tfdist.errors import HUNG, START_ME_AGAIN
from tfdist.launch.cause import Failure, root_cause
from tfdist.launch.crew import Crew
from tfdist.launch.output import Screen
from tfdist.launch.plan import Worker
from tfdist.launch.signals import handled

# How long a failure that only blames a peer waits for that peer's own.
_PEER_FAILURE_S = 1.0
_AFTER_FAILURE = ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0))
_AFTER_INTERRUPT = ((signal.SIGINT, 3.0), *_AFTER_FAILURE)


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        status: The exit status for the launcher.
        failure: The worker's failure that ended the run; None if no worker failed.
        finished: The tasks that had already ended well when it failed.
        interrupted: The signal sent to the launcher, 0 if there was none.
    """

    status: int
    failure: Failure | None = None
    finished: tuple[str, ...] = ()
    interrupted: int = 0


def run_workers(
    workers: Sequence[Worker],
    *,
    log_dir: Path | None = None,
    stream: TextIO | None = None,
    max_restarts: int = 0,
    meeting: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Outcome:
    """Runs the workers of this machine until all have ended, or the first has failed.

    After a failure, and after SIGINT, SIGTERM or SIGHUP, the other workers are asked to end
    and then killed, children included. Should the launcher itself be killed, the workers
    notice that their end of a pipe was closed, and end themselves.

    Args:
        workers: What to start.
        log_dir: A folder for each worker's whole output, `worker-<i>.log`.
        stream: Where to write the workers' lines; standard output unless given.
        max_restarts: How often what was lost is started again: a worker that serves alone,
            else all. Only what a signal ended, what asked for it by status 75, or what hung
            (76), is lost.
        meeting: Makes a context around each start of all workers: where they meet.

    Returns:
        How the run ended.

    Raises:
        LaunchError: A worker could not be started or a log file not be written.
    """
    screen = Screen(stream or sys.stdout, [worker.task for worker in workers])
    restarts = _Restarts(max_restarts)
    with _signals() as received:
        while True:
            crew = Crew(screen)
            try:
                with meeting():
                    crew.start(workers, log_dir)
                    outcome = _watch(crew, received, restarts)
                if outcome.failure is None or not restarts.allows(outcome.failure):
                    return outcome
                position = list(workers).index(outcome.failure.worker)
                crew.say(position, restarts.note(outcome.failure, "All are started again"))
            except BrokenPipeError:
                # Whoever read the output is gone, as after `tfdist run ... | head`.
                return Outcome(128 + signal.SIGPIPE, interrupted=signal.SIGPIPE)
            finally:
                crew.close()


class _Restarts:
    """How many restarts are left."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._used = 0

    def allows(self, failure: Failure) -> bool:
        """Tells whether what failed was lost, and may be started again."""
        was_lost = failure.returncode < 0 or failure.returncode in (START_ME_AGAIN, HUNG)
        return was_lost and self._used < self._most

    def note(self, failure: Failure, what: str) -> str:
        """Counts a restart, and says so."""
        self._used += 1
        return f"tfdist: {failure.describe()} {what} ({self._used} of {self._most})."


def _watch(crew: Crew, received: list[int], restarts: _Restarts) -> Outcome:
    while crew.is_running and not received and not crew.failures and not crew.is_done:
        crew.pump()
        for failure in tuple(crew.failures):
            if failure.worker.is_replaceable and restarts.allows(failure):
                line = restarts.note(failure, "It is started again")
                crew.say(crew.start_again(failure), line)
    if crew.failures and not received:
        deadline = time.monotonic() + _PEER_FAILURE_S
        while (
            crew.is_running
            and not received
            and time.monotonic() < deadline
            and all(failure.blames_peer for failure in crew.failures)
        ):
            crew.pump()
    failures, finished = tuple(crew.failures), tuple(crew.finished)
    if received:
        first = received[0]
        crew.end(_AFTER_INTERRUPT if first == signal.SIGINT else _AFTER_FAILURE, received)
        return Outcome(128 + first, finished=finished, interrupted=first)
    crew.end(_AFTER_FAILURE, received)
    if not failures:
        return Outcome(0, finished=finished)
    failure = root_cause(failures)
    return Outcome(failure.status, failure, finished)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects the signals that end a run, in place of their usual effect."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    with handled((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), note):
        yield received
