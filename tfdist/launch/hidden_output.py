"""Keeps the output of workers that is not shown, so that it can be shown when they fail."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Literal

from tfdist.launch.cause import Failure
from tfdist.launch.worker import Worker

Shows = Literal["chief", "all", "failed"]
"""Whose output the launcher shows: the chief's or this machine's first worker's, that of all
workers, or only that of workers that fail."""

_MOST_LINES = 400
_TFDIST_PREFIX = "tfdist:"
_CONTINUATION_PREFIX = "  "


def leader(workers: Sequence[Worker]) -> int:
    """Chooses the worker whose output is shown: the chief, or the first of this machine.

    Args:
        workers: The workers that this machine starts.

    Returns:
        The position of the chosen worker.
    """
    driving = [i for i, worker in enumerate(workers) if not worker.serves]
    busy = [i for i, worker in enumerate(workers) if worker.is_replaceable]
    return (driving or busy or [0])[0]


def explain_hiding(shows: Shows, leader: Worker) -> str:
    """Returns a line which says that lines are hidden, and how to see them.

    Args:
        shows: Whose lines are shown.
        leader: The worker whose lines `chief` shows.
    """
    others = "a worker that fails" if shows == "failed" else f"{leader.task} is shown, and that"
    end = "is shown" if shows == "failed" else "of a worker that fails"
    return f"tfdist: only the output of {others} {end}. --output all shows all."


class ShownErrors:
    """The exceptions whose tracebacks the user has seen, so that none is shown twice."""

    def __init__(self) -> None:
        self._tasks: dict[str, str] = {}

    def note(self, failure: Failure) -> None:
        """Remembers that the traceback of a failure is shown."""
        if failure.last_error:
            self._tasks.setdefault(failure.last_error, failure.worker.task)

    def shorten(self, lines: list[str], failure: Failure, is_cause: bool) -> list[str]:
        """Replaces lines that say nothing new by one line.

        Args:
            lines: The lines of a failed worker.
            failure: Its failure.
            is_cause: Whether this failure has ended the run.
        """
        like = self._tasks.get(failure.last_error)
        if like is not None:
            return [f"tfdist: it failed as {like} did. {failure.last_error}"]
        if failure.blames_peer and not is_cause:
            return [f"tfdist: it lost another worker. {failure.last_error}"]
        self.note(failure)
        return lines


class HiddenOutput:
    """The lines of one worker; only tfdist's own lines are shown at once.

    Any worker may be the first to notice and report a hang, so its report must be shown.
    """

    def __init__(self) -> None:
        self._hidden_lines: deque[str] = deque(maxlen=_MOST_LINES)
        self._dropped = 0
        self._is_from_tfdist = False

    def take(self, lines: Sequence[str]) -> list[str]:
        """Keeps lines.

        Args:
            lines: The lines, as a terminal would show them.

        Returns:
            The lines of tfdist, which are to be shown now.
        """
        tfdist_lines = []
        for line in lines:
            self._is_from_tfdist = line.startswith(_TFDIST_PREFIX) or (
                self._is_from_tfdist and line.startswith(_CONTINUATION_PREFIX)
            )
            if self._is_from_tfdist:
                tfdist_lines.append(line)
                continue
            self._dropped += len(self._hidden_lines) == _MOST_LINES
            self._hidden_lines.append(line)
        return tfdist_lines

    def release(self) -> list[str]:
        """Returns the hidden lines, and forgets them."""
        lines, dropped = list(self._hidden_lines), self._dropped
        self._hidden_lines.clear()
        self._dropped = 0
        if not dropped:
            return lines
        return [
            f"tfdist: {dropped} earlier lines are left out; --output all shows all.",
            *lines,
        ]
