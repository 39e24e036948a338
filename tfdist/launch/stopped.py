"""Notices processes that are stopped (SIGSTOP) or silent, in every phase of a run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from tfdist.cluster import Cluster
from tfdist.errors import ArgumentError, ClusterError
from tfdist.launch.member import StartedWorker
from tfdist.watchdog.memory import state_of
from tfdist.watchdog.settings import HANG_LIMIT, ON_HANG, WatchdogSettings

_POLL_S = 0.5
_SUSPENDED_S = 5.0
# Workers that train watch each other. Their report says more, so it may come first.
_LEAD_S = 8.0
_WHY_SILENT = {
    "t": "a debugger holds it",
    "D": "it waits for a disk: the machine swaps, or a file system does not answer",
}
_LOCKED = "it has no processor, or something holds Python's interpreter lock"


@dataclass(frozen=True)
class Notice:
    """What the launcher has noticed of a worker.

    Attributes:
        member: The worker.
        text: A sentence about it.
        is_lost: Whether the worker is to be killed.
    """

    member: StartedWorker
    text: str
    is_lost: bool


class StoppedWorkers:
    """Waits the limit of a hang before a worker counts as stopped or silent.

    The launcher sees them in every phase: while workers start, when nobody waits for them, and
    when all are stopped. A run of one worker may be paused by its user.
    """

    def __init__(self) -> None:
        self._stopped_since: dict[int, float] = {}  # by the number of the process
        self._told: set[int] = set()  # who was silent
        self._read_at = self._running_since = 0.0

    def notices(self, members: Sequence[StartedWorker]) -> list[Notice]:
        """Looks at the workers' processes, twice a second.

        Args:
            members: The workers of this machine.
        """
        now = time.monotonic()
        if now - self._read_at < _POLL_S:
            return []
        pause, self._read_at = now - self._read_at, now
        if pause > _SUSPENDED_S:
            # This process did not run either, as when a scheduler suspends a whole job.
            self._stopped_since, self._running_since = {}, now
            return []
        running = [m for m in members if m.ended_at is None and not m.reason]
        states = {m.process.pid: state_of(m.process.pid) for m in running}
        before = self._stopped_since
        stopped = [pid for pid, state in states.items() if state == "T"]
        self._stopped_since = {pid: before.get(pid, now) for pid in stopped}
        notices = []
        for member in running:
            limit, pid = _limit(member), member.process.pid
            others = [m for m in running if m is not member and m.process.pid not in stopped]
            # What only serves is not waited for with a report, or can be replaced at once.
            lead = _LEAD_S if not member.worker.serves and any(map(_watches, others)) else 0.0
            if not limit:
                continue
            if pid in self._stopped_since:
                seconds = now - self._stopped_since[pid]
                if seconds >= limit + lead and not is_alone(members):
                    notices.append(_stopped(member, seconds, limit))
            elif not lead and (notice := self._silent(member, states[pid], now, limit)):
                notices.append(notice)
        return notices

    def _silent(
        self, member: StartedWorker, state: str | None, now: float, limit: float
    ) -> Notice | None:
        beat, pid = member.heartbeat.last_beat, member.process.pid
        if beat is None or now - max(beat, self._running_since) < limit:
            self._told.discard(pid)
            return None
        if pid in self._told:
            return None
        self._told.add(pid)
        text = (
            f"{member.worker.task} has not answered its launcher for {now - beat:.0f} s, "
            f"though its process {pid} runs: {_WHY_SILENT.get(state or '', _LOCKED)}."
        )
        return Notice(member, text, is_lost=False)


def _stopped(member: StartedWorker, seconds: float, limit: float) -> Notice:
    text = (
        f"{member.worker.task} has been stopped (SIGSTOP) for {seconds:.0f} s, and is killed "
        f"({HANG_LIMIT}={limit:g})."
    )
    return Notice(member, text, is_lost=True)


def is_alone(members: Sequence[StartedWorker]) -> bool:
    """Returns whether the run has one worker, on this machine.

    Args:
        members: The workers of this machine.
    """
    if len(members) != 1:
        return False
    try:
        cluster = Cluster.from_environment(members[0].worker.environment)
    except ClusterError:
        return True  # the worker itself will say so
    return cluster.num_workers == 1 and not cluster.has_parameter_servers


def _watches(member: StartedWorker) -> bool:
    """Returns whether a worker's watchdog watches the others."""
    return not member.worker.serves and member.heartbeat.read().steps_made > 0


def _limit(member: StartedWorker) -> float:
    """Returns the seconds after which a stopped worker counts as lost; 0 for never."""
    environment = member.worker.environment
    try:
        settings = WatchdogSettings.from_environment(environment)
    except ArgumentError:
        settings = WatchdogSettings()  # the worker itself will say so
    ends = environment.get(ON_HANG, settings.on_hang) == "end"
    return member.heartbeat.hang_limit(settings.limit if ends else 0.0)
