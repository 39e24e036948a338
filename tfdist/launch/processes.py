"""Runs the workers from start to end: success, a failure, or a signal to the launcher."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from tfdist.cluster.warning_signals import WARNINGS
from tfdist.errors import START_ME_AGAIN
from tfdist.launch.cause import Failure, root_cause
from tfdist.launch.client import CoordinatorClient, Decision
from tfdist.launch.console import background
from tfdist.launch.detached import end_forgotten
from tfdist.launch.hidden_output import Shows
from tfdist.launch.journal import Journal
from tfdist.launch.outcome import Outcome
from tfdist.launch.output import Screen
from tfdist.launch.process_group import ProcessGroup
from tfdist.launch.restarts import RestartCause, Restarts
from tfdist.launch.signals import Received, collecting
from tfdist.launch.slots import Slots
from tfdist.launch.worker import Worker

# If a failure only blames a peer, the launcher waits this long for the peer's own failure.
_PEER_FAILURE_S = 1.0
SAVING_S = 25.0
"""Seconds for saving after SIGTERM: Kubernetes kills a pod after 30."""

_AFTER_FAILURE = ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0))
_AFTER_INTERRUPT = ((signal.SIGINT, 3.0), *_AFTER_FAILURE)


def run_workers(
    workers: Sequence[Worker],
    *,
    log_dir: Path | None = None,
    stream: TextIO | None = None,
    restarts: Restarts | None = None,
    grace: float = SAVING_S,
    client: CoordinatorClient | None = None,
    slots: Slots | None = None,
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
    restarts = restarts or Restarts()
    stream, journal = stream or sys.stdout, journal or Journal()
    with collecting(warnings_end) as received, background(stream, received) as writer:
        screen = Screen(stream, [worker.task for worker in workers], writer=writer)
        screen.show(0, end_forgotten())
        while True:
            group = ProcessGroup(screen, shows, journal)
            try:
                if client is not None:
                    outcome = _run_with_peers(
                        group,
                        workers,
                        log_dir,
                        received,
                        restarts,
                        grace,
                        client,
                        plan,
                        meeting,
                        journal,
                    )
                    if outcome is None:
                        journal.note_restart(client.restarts.history[-1].cause)
                        continue
                    return replace(outcome, restarts=tuple(client.restarts.history))
                with meeting(workers[0]):
                    group.start(workers, log_dir)
                    outcome = _watch(group, received, restarts, grace)
                failure = outcome.failure
                restart = (
                    None
                    if failure is None
                    else _restart(failure, workers, restarts, slots, plan_again)
                )
                if failure is None or restart is None:
                    return replace(
                        outcome,
                        restarts=tuple(restarts.history),
                        is_repeated=failure is not None
                        and restarts.repeats(RestartCause.of(failure)),
                    )
                journal.note_restart(restarts.history[-1].cause)
                position = list(workers).index(failure.worker)
                workers, line = restart
                group.say(position, line)
            except BrokenPipeError:
                # The reader of the output is gone, as after `tfdist run ... | head`.
                return Outcome(128 + signal.SIGPIPE, interrupted=signal.SIGPIPE)
            finally:
                group.close()


def _restart(
    failure: Failure,
    workers: Sequence[Worker],
    restarts: Restarts,
    slots: Slots | None,
    plan_again: Callable[[], Sequence[Worker]] | None,
) -> tuple[Sequence[Worker], str] | None:
    """Returns the workers of the next start and a line for the user; None if there is none."""
    cause = RestartCause.of(failure)
    leaves_out = slots is not None and slots.leaves_out(failure)
    if not restarts.allows(cause, changes=leaves_out):
        return None
    action = "All are started again"
    if slots is not None:
        before = len(workers)
        slots.plan_next_start(failure)
        workers = slots.workers
        if leaves_out or len(workers) != before:
            action = f"{action}, now {len(workers)} in all"
    elif plan_again is not None:
        workers = plan_again()
    return workers, restarts.record(cause, action)


def _watch(
    group: ProcessGroup, received: Received, restarts: Restarts, grace: float
) -> Outcome:
    has_made_step = False
    while group.is_running and not received and not group.failures and not group.is_done:
        has_made_step = _pump(group, received, restarts, restarts, has_made_step)
    if group.failures and not received:
        deadline = time.monotonic() + _PEER_FAILURE_S
        while (
            group.is_running
            and not received
            and time.monotonic() < deadline
            and all(failure.blames_peer for failure in group.failures)
        ):
            group.pump()
    if received:
        return _interrupted(group, received, grace)
    failures, finished = tuple(group.failures), tuple(group.finished)
    if not failures:
        group.end(_AFTER_FAILURE, received)
        return Outcome(0, finished=finished)
    failure = root_cause(failures)
    _end_after(group, failures, failure, received)
    return Outcome(failure.status, failure, finished)


def _end_after(
    group: ProcessGroup, failures: Sequence[Failure], cause: Failure, received: Received
) -> None:
    """Ends the workers that are left after failures, and shows what the failed ones wrote."""
    group.reveal(failures, cause)
    group.end(_AFTER_FAILURE, received)
    # A worker may have failed by itself meanwhile, before the signal reached it.
    launcher_signals = {-number for number, _ in _AFTER_FAILURE}
    late = [
        f for f in group.failures if f not in failures and f.returncode not in launcher_signals
    ]
    group.reveal([f for f in late if not f.blames_peer])


def _pump(
    group: ProcessGroup,
    received: Received,
    of_all: Restarts,
    of_one: Restarts,
    has_made_step: bool,
) -> bool:
    """Shows output and replaces failed workers; tells whether training has made a step."""
    group.pump()
    # Not after a signal: it may have ended the reader too (`| tee`), while workers still save.
    group.check_reader()
    while received.warnings:
        number = received.warnings.pop(0)
        name = signal.Signals(number).name
        group.say(0, f"tfdist: {name}: workers in a `fit` with checkpoints save now.")
        group.pass_on(number)
    group.end_stopped()
    if not has_made_step and group.progress.steps_made:
        has_made_step = True
        of_all.record_step()
    for failure in tuple(group.failures):
        cause = RestartCause.of(failure)
        if failure.worker.is_replaceable and of_one.allows(cause):
            group.reveal([failure], failure)
            line = of_one.record(cause, "It is started again")
            group.say(group.start_again(failure), line)
    return has_made_step


def _run_with_peers(
    group: ProcessGroup,
    workers: Sequence[Worker],
    log_dir: Path | None,
    received: Received,
    replacements: Restarts,
    grace: float,
    client: CoordinatorClient,
    plan: Callable[[Sequence[int]], Sequence[Worker]] | None,
    meeting: Callable[[Worker], AbstractContextManager[Any]],
    journal: Journal,
) -> Outcome | None:
    """Runs workers together with those of other machines; None if all start again."""
    # Each machine reports once how its own workers ended, and then goes on with their output
    # until the coordinator has decided for all machines.
    failure, has_reported, has_made_step = None, False, False
    journal.note_alive("waiting for hosts", math.inf)  # the client has a limit
    decision = client.meet(received, lambda line: group.say(0, line))
    if plan is not None and client.active:
        workers = plan(client.active)
        group.rename([worker.task for worker in workers])
    # The server may start now: ranks import TensorFlow first, which takes seconds.
    with meeting(workers[0]):
        if decision is None and not received:
            group.start(workers, log_dir)
        failed_at = 0.0
        while decision is None and not received:
            has_made_step = _pump(group, received, client.restarts, replacements, has_made_step)
            decision = client.decision
            if has_reported:
                continue
            if group.failures:
                failed_at = failed_at or time.monotonic()
                failure = root_cause(group.failures)
                waited = time.monotonic() - failed_at > _PEER_FAILURE_S
                if waited or not group.is_running or not failure.blames_peer:
                    client.report_failure(RestartCause.of(failure))
                    has_reported = True
            elif not group.is_running or group.is_done:
                client.report_done()
                has_reported = True
        if received:
            outcome = _interrupted(group, received, grace)
            client.leave(outcome.status)
            return outcome
        assert decision is not None
        finished = tuple(group.finished)
        if failure is None:
            group.end(_AFTER_FAILURE, received)
        else:
            _end_after(group, tuple(group.failures), failure, received)
    return _decided(group, client, decision, failure, finished)


def _decided(
    group: ProcessGroup,
    client: CoordinatorClient,
    decision: Decision,
    failure: Failure | None,
    finished: tuple[str, ...],
) -> Outcome | None:
    """Follows the coordinator's decision after this machine's workers have ended.

    `failure` is this machine's, if it had one. The result is None if all start again.
    """
    if decision.cause is None:
        return Outcome(0, finished=finished)
    if decision.again:
        group.say(
            0, client.restarts.record(decision.cause, "All are started again on all hosts")
        )
        return None
    is_local = failure is not None and RestartCause.of(failure) == decision.cause
    return Outcome(
        decision.cause.status,
        failure if is_local else None,
        finished,
        is_repeated=decision.is_repeated,
        elsewhere=None if is_local else decision.cause,
    )


def _interrupted(group: ProcessGroup, received: Received, grace: float) -> Outcome:
    """Ends the workers after a signal to the launcher, and lets them save if they can."""
    first, is_saved = received[0], False
    is_warning = first in WARNINGS
    if (first == signal.SIGTERM or is_warning) and group.saves:
        group.signal_and_wait(signal.SIGTERM, grace, received)
        is_saved = any(
            f.progress.preempted and f.returncode == START_ME_AGAIN for f in group.failures
        )
        if not is_saved:
            group.say(0, f"tfdist: training was not saved within {grace:g} s (--grace).")
    finished = tuple(group.finished)
    group.end(_AFTER_INTERRUPT if first == signal.SIGINT else _AFTER_FAILURE, received)
    # A warning asks to be started again, whether or not there was something to save.
    status = START_ME_AGAIN if is_saved or is_warning else 128 + first
    return Outcome(status, finished=finished, interrupted=first)
