"""A run of several machines, whose launchers decide together when all workers start again."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from tfdist.launch.cause import Failure, root_cause
from tfdist.launch.client import CoordinatorClient, Decision
from tfdist.launch.outcome import Outcome
from tfdist.launch.process_group import ProcessGroup
from tfdist.launch.restarts import RestartCause
from tfdist.launch.supervision import PEER_FAILURE_S, Supervision
from tfdist.launch.worker import Worker


class JointRun:
    """A run whose launchers on several machines act together.

    Args:
        supervision: What all starts share.
        workers: This machine's workers in a start with all machines.
        client: The connection to the launchers of the other machines.
        plan: Returns this machine's workers for a start with some of the machines, from the
            numbers of these machines.
    """

    def __init__(
        self,
        supervision: Supervision,
        workers: Sequence[Worker],
        client: CoordinatorClient,
        plan: Callable[[Sequence[int]], Sequence[Worker]] | None,
    ) -> None:
        self._supervision, self._workers = supervision, workers
        self._client, self._plan = client, plan

    def start(self, group: ProcessGroup) -> Outcome | None:
        """Starts this machine's workers once, when the others do, and waits for their end.

        Args:
            group: Starts their processes.

        Returns:
            How the run ended; None if all start again.
        """
        outcome = self._run(group)
        history = self._client.restarts.history
        if outcome is None:
            self._supervision.journal.note_restart(history[-1].cause)
            return None
        return replace(outcome, restarts=tuple(history))

    def _run(self, group: ProcessGroup) -> Outcome | None:
        client, supervision = self._client, self._supervision
        received, workers = supervision.received, self._workers
        supervision.journal.note_alive("waiting for hosts", math.inf)  # the client has a limit
        decision = client.meet(received, lambda line: group.say(0, line))
        if self._plan is not None and client.active:
            workers = self._plan(client.active)
            group.rename([worker.task for worker in workers])
        # The server may start now: ranks import TensorFlow first, which takes seconds.
        with supervision.meeting(workers[0]):
            if decision is None and not received:
                group.start(workers, supervision.log_dir)
                decision, failure = self._watch(group)
            else:
                failure = None
            if received:
                outcome = supervision.interrupted(group)
                client.leave(outcome.status)
                return outcome
            assert decision is not None
            finished = tuple(group.finished)
            if failure is None:
                supervision.end_all(group)
            else:
                supervision.end_after(group, tuple(group.failures), failure)
        return self._decided(group, decision, failure, finished)

    def _watch(self, group: ProcessGroup) -> tuple[Decision | None, Failure | None]:
        """Waits until the coordinator has decided for all machines, or a signal has come.

        Each machine reports once how its own workers ended, and then goes on with their output.

        Returns:
            The decision, and the failure of this machine.
        """
        client, supervision = self._client, self._supervision
        failure, has_reported, has_made_step = None, False, False
        failed_at, decision = 0.0, None
        while decision is None and not supervision.received:
            has_made_step = supervision.pump(group, client.restarts, has_made_step)
            decision = client.decision
            if has_reported:
                continue
            if group.failures:
                failed_at = failed_at or time.monotonic()
                failure = root_cause(group.failures)
                waited = time.monotonic() - failed_at > PEER_FAILURE_S
                if waited or not group.is_running or not failure.blames_peer:
                    client.report_failure(RestartCause.of(failure))
                    has_reported = True
            elif not group.is_running or group.is_done:
                client.report_done()
                has_reported = True
        return decision, failure

    def _decided(
        self,
        group: ProcessGroup,
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
            action = "All are started again on all hosts"
            group.say(0, self._client.restarts.record(decision.cause, action))
            return None
        is_local = failure is not None and RestartCause.of(failure) == decision.cause
        return Outcome(
            decision.cause.status,
            failure if is_local else None,
            finished,
            is_repeated=decision.is_repeated,
            elsewhere=None if is_local else decision.cause,
        )
