"""Watches the workers of one start on this machine, and ends those that are left."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfdist.cluster.warning_signals import WARNINGS
from tfdist.errors import START_ME_AGAIN
from tfdist.launch.cause import Failure, root_cause
from tfdist.launch.journal import Journal
from tfdist.launch.outcome import Outcome
from tfdist.launch.process_group import ProcessGroup
from tfdist.launch.restarts import RestartCause, Restarts
from tfdist.launch.signals import Received
from tfdist.launch.worker import Worker

PEER_FAILURE_S = 1.0
"""If a failure only blames a peer, the launcher waits this long for the peer's own failure."""

_AFTER_FAILURE = ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0))
_AFTER_INTERRUPT = ((signal.SIGINT, 3.0), *_AFTER_FAILURE)


@dataclass(frozen=True)
class Supervision:
    """What all starts of a run share, and how each of them is watched and ended.

    Attributes:
        received: The signals that the launcher has received.
        restarts: How often failed workers are started again.
        grace: Seconds that workers may take to save after SIGTERM.
        log_dir: A folder for the log files.
        meeting: Makes a context around each start; its argument is the first worker.
        journal: Gets what happens.
    """

    received: Received
    restarts: Restarts
    grace: float
    log_dir: Path | None
    meeting: Callable[[Worker], AbstractContextManager[Any]]
    journal: Journal

    def run(self, group: ProcessGroup, workers: Sequence[Worker]) -> Outcome:
        """Starts workers, and waits until all have ended, or the first has failed.

        Args:
            group: Starts their processes.
            workers: The workers.
        """
        with self.meeting(workers[0]):
            group.start(workers, self.log_dir)
            return self._watch(group)

    def _watch(self, group: ProcessGroup) -> Outcome:
        received, has_made_step = self.received, False
        while group.is_running and not received and not group.failures and not group.is_done:
            has_made_step = self.pump(group, self.restarts, has_made_step)
        if group.failures and not received:
            deadline = time.monotonic() + PEER_FAILURE_S
            while (
                group.is_running
                and not received
                and time.monotonic() < deadline
                and all(failure.blames_peer for failure in group.failures)
            ):
                group.pump()
        if received:
            return self.interrupted(group)
        failures, finished = tuple(group.failures), tuple(group.finished)
        if not failures:
            self.end_all(group)
            return Outcome(0, finished=finished)
        failure = root_cause(failures)
        self.end_after(group, failures, failure)
        return Outcome(failure.status, failure, finished)

    def pump(self, group: ProcessGroup, of_all: Restarts, has_made_step: bool) -> bool:
        """Shows output, and replaces failed workers that can be replaced alone.

        Args:
            group: The workers.
            of_all: Counts the starts of all workers together.
            has_made_step: Whether training has made a step in this start.

        Returns:
            Whether it has made one now.
        """
        received, of_one = self.received, self.restarts
        group.pump()
        # Not after a signal: it may have ended the reader too (`| tee`), while workers save.
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

    def end_all(self, group: ProcessGroup) -> None:
        """Ends the workers that are left, such as parameter servers.

        Args:
            group: The workers.
        """
        group.end(_AFTER_FAILURE, self.received)

    def end_after(
        self, group: ProcessGroup, failures: Sequence[Failure], cause: Failure
    ) -> None:
        """Ends the workers that are left after failures, and shows what the failed ones wrote.

        Args:
            group: The workers.
            failures: The failures.
            cause: The one that caused the others.
        """
        group.reveal(failures, cause)
        self.end_all(group)
        # A worker may have failed by itself meanwhile, before the signal reached it.
        launcher_signals = {-number for number, _ in _AFTER_FAILURE}
        late = [
            f
            for f in group.failures
            if f not in failures and f.returncode not in launcher_signals
        ]
        group.reveal([f for f in late if not f.blames_peer])

    def interrupted(self, group: ProcessGroup) -> Outcome:
        """Ends the workers after a signal to the launcher, and lets them save if they can.

        Args:
            group: The workers.
        """
        received, grace = self.received, self.grace
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
