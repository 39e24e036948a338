"""Runs the workers from start to end: success, a failure, or a signal to the launcher."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from tfdist.errors import START_ME_AGAIN
from tfdist.launch.cause import Failure, root_cause
from tfdist.launch.client import CoordinatorClient
from tfdist.launch.output import Screen
from tfdist.launch.process_group import ProcessGroup
from tfdist.launch.restarts import Restart, RestartCause, Restarts
from tfdist.launch.signals import handled
from tfdist.launch.slots import Slots
from tfdist.launch.worker import Worker

# How long a failure that only blames a peer waits for that peer's own.
_PEER_FAILURE_S = 1.0
SAVING_S = 25.0
"""Seconds for saving after SIGTERM: Kubernetes kills a pod after 30."""

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
        restarts: What was started again meanwhile.
        is_repeated: Whether the failure came twice in a row at the same step.
        elsewhere: What ended the run, if that was on another machine.
    """

    status: int
    failure: Failure | None = None
    finished: tuple[str, ...] = ()
    interrupted: int = 0
    restarts: tuple[Restart, ...] = ()
    is_repeated: bool = False
    elsewhere: RestartCause | None = None


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
    shows_all: bool = True,
) -> Outcome:
    """Runs the workers of this machine until all have ended, or the first has failed.

    After a failure, and after SIGINT, SIGTERM or SIGHUP, the other workers are asked to end
    and then killed, children included. Should the launcher itself be killed, the workers
    notice that their end of a pipe was closed, and end themselves.

    Args:
        workers: What to start.
        log_dir: A folder for each worker's whole output, `worker-<i>.log`.
        stream: Where to write the workers' lines; standard output unless given.
        restarts: How often a worker that failed is started again: one that serves alone,
            else all with it. Never, unless given.
        grace: How many seconds workers that save may take for it after SIGTERM.
        client: To the launchers of other machines, with which all of this is done together.
        plan: Gives the workers of this machine when only some of all take part, by their
            numbers.
        slots: Chooses the workers of each start after the first, in place of `workers`.
        meeting: Makes a context around each start of all workers: where they meet. It is given
            the first of them.
        shows_all: Whether the lines of all workers are shown; else the chief's, or those of
            the first worker of this machine, and of others what tfdist says itself and what
            one that fails has written.

    Returns:
        How the run ended.

    Raises:
        LaunchError: A worker could not be started or a log file not be written, or the
            launchers of other machines do not come.
    """
    screen = Screen(stream or sys.stdout, [worker.task for worker in workers])
    restarts = restarts or Restarts()
    with _signals() as received:
        while True:
            group = ProcessGroup(screen, shows_all)
            try:
                if client is not None:
                    ended = _run_with_others(
                        group,
                        workers,
                        log_dir,
                        received,
                        restarts,
                        grace,
                        client,
                        plan,
                        meeting,
                    )
                    if ended is None:
                        continue
                    return replace(ended, restarts=tuple(client.restarts.made))
                with meeting(workers[0]):
                    group.start(workers, log_dir)
                    outcome = _watch(group, received, restarts, grace)
                cause = None if outcome.failure is None else RestartCause.of(outcome.failure)
                loses = (
                    slots is not None
                    and outcome.failure is not None
                    and slots.loses(outcome.failure)
                )
                if (
                    outcome.failure is None
                    or cause is None
                    or not restarts.allows(cause, changes=loses)
                ):
                    return replace(
                        outcome,
                        restarts=tuple(restarts.made),
                        is_repeated=cause is not None and restarts.repeats(cause),
                    )
                position = list(workers).index(outcome.failure.worker)
                what = "All are started again"
                if slots is not None:
                    before = len(workers)
                    slots.note(outcome.failure)
                    workers = slots.workers
                    if loses or len(workers) != before:
                        what = f"{what}, now {len(workers)} in all"
                group.say(position, restarts.note(cause, what))
            except BrokenPipeError:
                # Whoever read the output is gone, as after `tfdist run ... | head`.
                return Outcome(128 + signal.SIGPIPE, interrupted=signal.SIGPIPE)
            finally:
                group.close()


def _watch(
    group: ProcessGroup, received: list[int], restarts: Restarts, grace: float
) -> Outcome:
    has_gone_on = False
    while group.is_running and not received and not group.failures and not group.is_done:
        has_gone_on = _pump(group, restarts, restarts, has_gone_on)
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
    group: ProcessGroup, failures: Sequence[Failure], cause: Failure, received: list[int]
) -> None:
    """Ends the workers that are left after failures, and shows what failed ones wrote."""
    group.reveal(failures, cause)
    group.end(_AFTER_FAILURE, received)
    # One may have failed by itself meanwhile, before the signal came to it.
    ours = {-number for number, _ in _AFTER_FAILURE}
    late = [f for f in group.failures if f not in failures and f.returncode not in ours]
    group.reveal([f for f in late if not f.blames_peer])


def _pump(group: ProcessGroup, of_all: Restarts, of_one: Restarts, has_gone_on: bool) -> bool:
    """Does what is due while workers run; tells whether a step was made since they began."""
    group.pump()
    group.end_stopped()
    if not has_gone_on and group.told.made:
        has_gone_on = True
        of_all.note_step()
    for failure in tuple(group.failures):
        cause = RestartCause.of(failure)
        if failure.worker.is_replaceable and of_one.allows(cause):
            group.reveal([failure], failure)
            line = of_one.note(cause, "It is started again")
            group.say(group.start_again(failure), line)
    return has_gone_on


def _run_with_others(
    group: ProcessGroup,
    workers: Sequence[Worker],
    log_dir: Path | None,
    received: list[int],
    replaced: Restarts,
    grace: float,
    client: CoordinatorClient,
    plan: Callable[[Sequence[int]], Sequence[Worker]] | None,
    meeting: Callable[[Worker], AbstractContextManager[Any]],
) -> Outcome | None:
    """Runs workers together with those of other machines; None if all are started again."""
    failure, is_told, has_gone_on = None, False, False
    news = client.meet(received, lambda line: group.say(0, line))
    if plan is not None and client.active:
        workers = plan(client.active)
        group.rename([worker.task for worker in workers])
    # The others' ranks come to it seconds later: they import TensorFlow first.
    with meeting(workers[0]):
        if news is None and not received:
            group.start(workers, log_dir)
        failed_at = 0.0
        while news is None and not received:
            has_gone_on = _pump(group, client.restarts, replaced, has_gone_on)
            news = client.news
            if is_told:
                continue
            if group.failures:
                failed_at = failed_at or time.monotonic()
                failure = root_cause(group.failures)
                waited = time.monotonic() - failed_at > _PEER_FAILURE_S
                if waited or not group.is_running or not failure.blames_peer:
                    client.failed(RestartCause.of(failure))
                    is_told = True
            elif not group.is_running or group.is_done:
                client.done()
                is_told = True
        if received:
            outcome = _interrupted(group, received, grace)
            client.leave(outcome.status)
            return outcome
        assert news is not None
        finished = tuple(group.finished)
        if failure is None:
            group.end(_AFTER_FAILURE, received)
        else:
            _end_after(group, tuple(group.failures), failure, received)
    if news.cause is None:
        return Outcome(0, finished=finished)
    if news.again:
        group.say(0, client.restarts.note(news.cause, "All are started again on all hosts"))
        return None
    is_ours = failure is not None and RestartCause.of(failure) == news.cause
    return Outcome(
        news.cause.status,
        failure if is_ours else None,
        finished,
        is_repeated=news.is_repeated,
        elsewhere=None if is_ours else news.cause,
    )


def _interrupted(group: ProcessGroup, received: list[int], grace: float) -> Outcome:
    """Ends the workers after a signal to the launcher, and lets them save if they can."""
    first, is_saved = received[0], False
    if first == signal.SIGTERM and group.saves:
        group.ask(first, grace, received)
        is_saved = any(
            f.told.preempted and f.returncode == START_ME_AGAIN for f in group.failures
        )
    finished = tuple(group.finished)
    group.end(_AFTER_INTERRUPT if first == signal.SIGINT else _AFTER_FAILURE, received)
    status = START_ME_AGAIN if is_saved else 128 + first
    return Outcome(status, finished=finished, interrupted=first)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects the signals that end a run, in place of their usual effect."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    with handled((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), note):
        yield received
