"""Runs the workers from start to end: success, a failure, or a signal to the launcher."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from tfdist.launch.cause import Failure
from tfdist.launch.client import CoordinatorClient
from tfdist.launch.console import background
from tfdist.launch.detached import end_forgotten
from tfdist.launch.hidden_output import Shows
from tfdist.launch.joint_run import JointRun
from tfdist.launch.journal import Journal
from tfdist.launch.outcome import Outcome
from tfdist.launch.output import Screen
from tfdist.launch.process_group import ProcessGroup
from tfdist.launch.restarts import RestartCause, Restarts
from tfdist.launch.signals import collecting
from tfdist.launch.slots import ElasticSlots
from tfdist.launch.supervision import Supervision
from tfdist.launch.worker import Worker

SAVING_S = 25.0
"""Seconds for saving after SIGTERM: Kubernetes kills a pod after 30."""


def run_workers(
    workers: Sequence[Worker],
    *,
    log_dir: Path | None = None,
    stream: TextIO | None = None,
    restarts: Restarts | None = None,
    grace: float = SAVING_S,
    client: CoordinatorClient | None = None,
    slots: ElasticSlots | None = None,
    plan: Callable[[Sequence[int]], Sequence[Worker]] | None = None,
    meeting: Callable[[Worker], AbstractContextManager[Any]] = nullcontext,
    shows: Shows = "all",
    plan_again: Callable[[], Sequence[Worker]] | None = None,
    warnings_end: bool = False,
    journal: Journal | None = None,
) -> Outcome:
    """Runs the workers of this machine until all have ended, or the first has failed.

    After a failure, and after SIGINT, SIGTERM or SIGHUP, the other workers and their child
    processes are asked to end and then killed. If the launcher itself is killed, the workers
    notice that their pipe to it is closed, and end themselves.

    Args:
        workers: The workers to start.
        log_dir: A folder for the log files.
        stream: The stream for the workers' lines; standard output by default.
        restarts: How often failed workers are started again; never by default. A worker that
            only serves is started again alone, any other worker together with all.
        grace: Seconds that workers may take to save after SIGTERM.
        client: The connection to the launchers of other machines, which then act together.
        plan: Returns this machine's workers for a start with some of the machines, from the
            numbers of these machines.
        slots: Chooses the workers of each start after the first, in place of `workers`.
        meeting: Makes a context around each start of all workers, such as a rendezvous
            server. Its argument is the first worker.
        shows: Whose lines to show. `chief` is the chief, or this machine's first worker. Of the
            other workers tfdist's own lines are shown, and those of a worker that fails.
        plan_again: Returns the workers of each start after the first, with other ports: a port
            may have been taken meanwhile. By default they are `workers`.
        warnings_end: Whether SIGUSR1 and SIGUSR2 to the launcher save and end the run with
            status 75. Otherwise they are passed on to the workers.
        journal: Gets what happens.

    Returns:
        How the run ended.

    Raises:
        LaunchError: A worker could not be started, a log file could not be written, or the
            launchers of other machines do not come.
    """
    restarts, journal = restarts or Restarts(), journal or Journal()
    stream = stream or sys.stdout
    with collecting(warnings_end) as received, background(stream, received) as writer:
        screen = Screen(stream, [worker.task for worker in workers], writer=writer)
        screen.show(0, end_forgotten())
        supervision = Supervision(received, restarts, grace, log_dir, meeting, journal)
        run: _LocalRun | JointRun
        if client is None:
            run = _LocalRun(supervision, workers, slots, plan_again)
        else:
            run = JointRun(supervision, workers, client, plan)
        while True:
            group = ProcessGroup(screen, shows, journal)
            try:
                outcome = run.start(group)
                if outcome is not None:
                    return outcome
            except BrokenPipeError:
                # The reader of the output is gone, as after `tfdist run ... | head`.
                return Outcome(128 + signal.SIGPIPE, interrupted=signal.SIGPIPE)
            finally:
                group.close()


class _LocalRun:
    """A run whose workers this machine starts again by itself.

    Args:
        supervision: What all starts share.
        workers: The workers of the first start.
        slots: As in `run_workers`.
        plan_again: As in `run_workers`.
    """

    def __init__(
        self,
        supervision: Supervision,
        workers: Sequence[Worker],
        slots: ElasticSlots | None,
        plan_again: Callable[[], Sequence[Worker]] | None,
    ) -> None:
        self._supervision, self._workers = supervision, workers
        self._slots, self._plan_again = slots, plan_again

    def start(self, group: ProcessGroup) -> Outcome | None:
        """Starts the workers once, and waits for their end.

        Args:
            group: Starts their processes.

        Returns:
            How the run ended; None if all start again.
        """
        restarts = self._supervision.restarts
        outcome = self._supervision.run(group, self._workers)
        failure = outcome.failure
        if failure is None:
            return replace(outcome, restarts=tuple(restarts.history))
        position = list(self._workers).index(failure.worker)
        line = self._plan_restart(failure, restarts)
        if line is None:
            is_repeated = restarts.repeats(RestartCause.of(failure))
            return replace(outcome, restarts=tuple(restarts.history), is_repeated=is_repeated)
        self._supervision.journal.note_restart(restarts.history[-1].cause)
        group.say(position, line)
        return None

    def _plan_restart(self, failure: Failure, restarts: Restarts) -> str | None:
        """Chooses the workers of the next start.

        Returns:
            A line for the user; None if there is no further start.
        """
        cause, slots = RestartCause.of(failure), self._slots
        leaves_out = slots is not None and slots.leaves_out(failure)
        if not restarts.allows(cause, changes=leaves_out):
            return None
        action = "All are started again"
        if slots is not None:
            before = len(self._workers)
            slots.plan_next_start(failure)
            self._workers = slots.workers
            if leaves_out or len(self._workers) != before:
                action = f"{action}, now {len(self._workers)} in all"
        elif self._plan_again is not None:
            self._workers = self._plan_again()
        return restarts.record(cause, action)
