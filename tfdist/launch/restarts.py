"""Restarts: which failures allow one, how many were made, and their lines in the summary."""

from __future__ import annotations

import dataclasses
import math
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tfdist.cluster.environment import whole_number
from tfdist.errors import HUNG, START_ME_AGAIN, LaunchError
from tfdist.launch.cause import Failure

_INTERRUPTED = (-signal.SIGINT, 128 + signal.SIGINT)
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class RestartCause:
    """Why workers start again; it can be sent to the launchers of other machines.

    Attributes:
        what: The failed worker or machine and its failure: a sentence.
        where: How far the worker was, in words.
        ended: The time of the failure, in seconds since 1970.
        status: The exit status of a run that ends with this failure.
        is_lost: Whether a process or machine was lost; otherwise the program failed.
        is_final: Whether a user ended the run.
        blames_peer: Whether the worker only reports that another worker went away.
        signature: Equal for the same failure at the same step; empty if such a repetition
            says nothing about the next start.
    """

    what: str
    where: str
    ended: float
    status: int
    is_lost: bool = True
    is_final: bool = False
    blames_peer: bool = False
    signature: tuple[Any, ...] = ()

    @classmethod
    def of(cls, failure: Failure) -> RestartCause:
        """Makes the cause from a worker's failure.

        Args:
            failure: The worker's failure.
        """
        progress, returncode = failure.progress, failure.returncode
        signature = (
            failure.worker.task, returncode, failure.last_error, progress.epoch, progress.step
        )  # fmt: skip
        return cls(
            what=failure.describe(),
            where=progress.where,
            ended=failure.ended,
            status=failure.status,
            is_lost=returncode < 0 or returncode in (START_ME_AGAIN, HUNG),
            is_final=returncode in _INTERRUPTED,
            blames_peer=failure.blames_peer,
            signature=() if progress.preempted or failure.is_from_outside else signature,
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the fields, in types that JSON has."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> RestartCause:
        """Makes the cause from the fields that `to_json` returned."""
        return cls(**{**fields, "signature": tuple(fields["signature"])})


@dataclass
class Restart:
    """One restart.

    Attributes:
        cause: The cause of the restart.
        seconds: Seconds from the failure until the next step; None if that is not known.
    """

    cause: RestartCause
    seconds: float | None = None

    def line(self, number: int) -> str:
        """Returns the restart's line in the summary.

        Args:
            number: The number of the restart, from 1.
        """
        clock = time.strftime("%H:%M:%S", time.localtime(self.cause.ended))
        later = ""
        if self.seconds is not None:
            later = f" The next step was made {self.seconds:.1f} s later."
        return f"{number}. {clock}, {self.cause.where}: {self.cause.what}{later}"


@dataclass(frozen=True)
class RestartLimit:
    """The most restarts of a run.

    Attributes:
        count: The most restarts, or the most within a time.
        seconds: That time; infinite if all restarts of the run count.
    """

    count: int = 0
    seconds: float = math.inf

    @classmethod
    def parse(cls, text: str) -> RestartLimit:
        """Reads the value of `--max-restarts`.

        Args:
            text: A number, or a number and a time, such as "3/10m".

        Raises:
            LaunchError: The text is malformed.

        Example:
            >>> RestartLimit.parse("3/10m")
            RestartLimit(count=3, seconds=600.0)
        """
        number, slash, time_text = text.partition("/")
        count = whole_number(number)
        match = re.fullmatch(r"(\d{1,9})([smhd])", time_text.strip())
        seconds = float(int(match[1]) * _UNITS[match[2]]) if match else 0.0
        if count is None or (slash and not seconds):
            raise LaunchError(
                "`--max-restarts` must be a number, or a number and a time in which so many "
                f"are allowed, in s, m, h or d. Received: --max-restarts={text[:40]!r}. "
                "Write it like 3 or 3/10m."
            )
        return cls(count, seconds if slash else math.inf)

    @property
    def setting(self) -> int | str:
        """The value of `--max-restarts`: a number, or a text if there is a time."""
        return self.count if self.seconds == math.inf else str(self)

    def __str__(self) -> str:
        if self.seconds == math.inf:
            return str(self.count)
        unit = max((u for u in _UNITS if self.seconds % _UNITS[u] == 0), key=_UNITS.__getitem__)
        return f"{self.count}/{self.seconds / _UNITS[unit]:g}{unit}"


class Restarts:
    """The restarts of a run.

    Args:
        limit: The most restarts.
        of_exceptions: Whether to start again after an exception in the program too, and not
            only after the loss of a process or machine.

    Attributes:
        limit: The most restarts.
        history: The restarts so far, in their order.
    """

    def __init__(self, limit: int | RestartLimit = 0, of_exceptions: bool = True) -> None:
        self.history: list[Restart] = []
        self.limit = limit if isinstance(limit, RestartLimit) else RestartLimit(limit)
        self._of_exceptions = of_exceptions

    def adopt(self, causes: Sequence[RestartCause]) -> None:
        """Takes over the list of a launcher that has seen more restarts.

        Args:
            causes: The causes of these restarts.
        """
        self.history = [Restart(cause) for cause in causes]

    def allows(self, cause: RestartCause, changes: bool = False) -> bool:
        """Returns whether to start again.

        Args:
            cause: The cause of the restart.
            changes: Whether the next start leaves out the failed worker; then the same
                failure may come twice.
        """
        is_eligible = cause.is_lost or self._of_exceptions
        return (
            is_eligible
            and not cause.is_final
            and self._counting(cause) < self.limit.count
            and (changes or not self.repeats(cause))
        )

    def _counting(self, cause: RestartCause) -> int:
        """Returns how many of the restarts were within the time that counts, before a cause."""
        return sum(
            cause.ended - restart.cause.ended < self.limit.seconds for restart in self.history
        )

    def repeats(self, cause: RestartCause) -> bool:
        """Returns whether the last restart had the same cause: such restarts would never end.

        Args:
            cause: The cause of the present failure.
        """
        return bool(
            self.history
            and cause.signature
            and cause.signature == self.history[-1].cause.signature
        )

    def record(self, cause: RestartCause, action: str) -> str:
        """Counts a restart.

        Args:
            cause: The cause of the restart.
            action: A sentence that says what is started again, without its full stop.

        Returns:
            The line that tells the user.
        """
        count = self._counting(cause) + 1
        self.history.append(Restart(cause))
        return f"tfdist: {cause.what} {action} ({count} of {self.limit})."

    def record_step(self) -> None:
        """Records that training made a step after the last restart."""
        for restart in self.history:
            if restart.seconds is None:
                restart.seconds = time.time() - restart.cause.ended


def restart_lines(restarts: Sequence[Restart]) -> list[str]:
    """Returns the lines of the summary.

    Args:
        restarts: The restarts of a run.
    """
    if not restarts:
        return []
    head = "1 restart:" if len(restarts) == 1 else f"{len(restarts)} restarts:"
    return [head, *(f"  {restart.line(i + 1)}" for i, restart in enumerate(restarts))]
