"""What is kept of workers whose output is not shown: nothing of it is lost when they fail."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from tfdist.launch.worker import Worker

_KEPT_LINES = 400
_OWN = "tfdist:"
_CONTINUED = "  "


def leader(workers: Sequence[Worker]) -> int:
    """Chooses the worker whose output is shown: the chief, or the first of this machine.

    Args:
        workers: Those that this machine starts.

    Returns:
        Its position.
    """
    driving = [i for i, worker in enumerate(workers) if not worker.serves]
    busy = [i for i, worker in enumerate(workers) if worker.is_replaceable]
    return (driving or busy or [0])[0]


class HiddenOutput:
    """The lines of one worker, of which only tfdist's own are shown at once.

    A hang is reported by whichever worker sees it first, so those must be seen.
    """

    def __init__(self) -> None:
        self._kept: deque[str] = deque(maxlen=_KEPT_LINES)
        self._dropped = 0
        self._is_own = False

    def take(self, lines: Sequence[str]) -> list[str]:
        """Keeps lines.

        Args:
            lines: As a terminal would show them.

        Returns:
            Those of tfdist, to be shown now.
        """
        own = []
        for line in lines:
            self._is_own = line.startswith(_OWN) or (
                self._is_own and line.startswith(_CONTINUED)
            )
            if self._is_own:
                own.append(line)
                continue
            self._dropped += len(self._kept) == _KEPT_LINES
            self._kept.append(line)
        return own

    def release(self) -> list[str]:
        """Gives what was kept, and forgets it."""
        lines, dropped = list(self._kept), self._dropped
        self._kept.clear()
        self._dropped = 0
        if not dropped:
            return lines
        return [f"tfdist: {dropped} lines before are left out; --output all shows all.", *lines]
