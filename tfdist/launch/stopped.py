"""Notices workers that are stopped (SIGSTOP) after all other workers have ended."""

from __future__ import annotations

import time
from collections.abc import Sequence

from tfdist.launch.member import StartedWorker
from tfdist.watchdog.memory import state_of
from tfdist.watchdog.settings import HANG_LIMIT, WatchdogSettings


class StoppedWorkers:
    """Waits the limit of a hang before stopped workers count as lost.

    While other workers run, their watchdogs notice a stopped worker. A run of one worker may
    be paused by its user.
    """

    def __init__(self) -> None:
        self._since: float | None = None

    def lost(self, members: Sequence[StartedWorker]) -> list[tuple[StartedWorker, str]]:
        """Returns the workers that have been stopped for too long, with a line for the user.

        Args:
            members: The workers of this machine.
        """
        running = [m for m in members if m.ended_at is None]
        is_left_alone = 0 < len(running) < len(members)
        if not is_left_alone or any(state_of(m.process.pid) != "T" for m in running):
            self._since = None
            return []
        now = time.monotonic()
        self._since = self._since or now
        limit = WatchdogSettings.from_environment(running[0].worker.environment).limit
        if not limit or now - self._since < limit:
            return []
        return [
            (
                member,
                f"tfdist: {member.worker.task} is stopped (SIGSTOP), and all others have "
                f"ended. After {limit:g} s ({HANG_LIMIT}) it is killed.",
            )
            for member in running
        ]
