"""What is started again, how often, and the list of it for the summary."""

from __future__ import annotations

import dataclasses
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tfdist.errors import HUNG, START_ME_AGAIN
from tfdist.launch.cause import Failure

_INTERRUPTED = (-signal.SIGINT, 128 + signal.SIGINT)


@dataclass(frozen=True)
class RestartCause:
    """Why workers are to be started again; it can be sent to the launchers of other machines.

    Attributes:
        what: Who failed, and how: a sentence.
        where: How far it was, in words.
        ended: When, in seconds since 1970.
        status: The exit status for a run that ends with it.
        is_lost: Whether a process or machine was lost, rather than a program failing.
        is_final: Whether somebody wanted the end.
        blames_peer: Whether all it says is that another worker went away.
        signature: The same for the same failure at the same step; empty where that says
            nothing about the next time.
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
        """Makes it of a worker's failure.

        Args:
            failure: The worker's.
        """
        told, returncode = failure.told, failure.returncode
        signature = (
            failure.worker.task, returncode, failure.last_error, told.epoch, told.step
        )  # fmt: skip
        return cls(
            what=failure.describe(),
            where=told.where,
            ended=failure.ended,
            status=failure.status,
            is_lost=returncode < 0 or returncode in (START_ME_AGAIN, HUNG),
            is_final=returncode in _INTERRUPTED,
            blames_peer=failure.blames_peer,
            signature=() if told.preempted else signature,
        )

    def to_json(self) -> dict[str, Any]:
        """Gives what JSON knows."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> RestartCause:
        """Reads what `to_json` gave."""
        return cls(**{**fields, "signature": tuple(fields["signature"])})


@dataclass
class Restart:
    """One restart.

    Attributes:
        cause: Of it.
        seconds: From the failure until the next step was made; None if that is not known.
    """

    cause: RestartCause
    seconds: float | None = None

    def line(self, number: int) -> str:
        """Says it in a line.

        Args:
            number: Which one, from 1.
        """
        clock = time.strftime("%H:%M:%S", time.localtime(self.cause.ended))
        again = ""
        if self.seconds is not None:
            again = f" The next step was made {self.seconds:.1f} s later."
        return f"{number}. {clock}, {self.cause.where}: {self.cause.what}{again}"


class Restarts:
    """The restarts of a run.

    Args:
        most: How many there may be.
        of_exceptions: Whether a program that failed is started again too, not only what was
            lost.

    Attributes:
        most: How many there may be.
        made: Those that were, in their order.
    """

    def __init__(self, most: int = 0, of_exceptions: bool = True) -> None:
        self.made: list[Restart] = []
        self.most = most
        self._of_exceptions = of_exceptions

    def adopt(self, causes: Sequence[RestartCause]) -> None:
        """Takes over the list of a launcher that knows more.

        Args:
            causes: Of the restarts before.
        """
        self.made = [Restart(cause) for cause in causes]

    def allows(self, cause: RestartCause, changes: bool = False) -> bool:
        """Tells whether to start again.

        Args:
            cause: Why.
            changes: Whether the next start leaves out what failed, so that it may repeat.
        """
        may = cause.is_lost or self._of_exceptions
        return (
            may
            and not cause.is_final
            and len(self.made) < self.most
            and (changes or not self.repeats(cause))
        )

    def repeats(self, cause: RestartCause) -> bool:
        """Tells whether the restart before had the same cause: it would come for ever.

        Args:
            cause: Of the failure at hand.
        """
        return bool(
            self.made and cause.signature and cause.signature == self.made[-1].cause.signature
        )

    def note(self, cause: RestartCause, what: str) -> str:
        """Counts a restart, and says so.

        Args:
            cause: Why.
            what: Is started again: a sentence without its full stop.
        """
        self.made.append(Restart(cause))
        return f"tfdist: {cause.what} {what} ({len(self.made)} of {self.most})."

    def note_step(self) -> None:
        """Notes that a step was made: training has gone on."""
        for restart in self.made:
            if restart.seconds is None:
                restart.seconds = time.time() - restart.cause.ended


def listed(restarts: Sequence[Restart]) -> list[str]:
    """Gives the lines of the summary.

    Args:
        restarts: Those of a run.
    """
    if not restarts:
        return []
    head = "1 restart:" if len(restarts) == 1 else f"{len(restarts)} restarts:"
    return [head, *(f"  {restart.line(i + 1)}" for i, restart in enumerate(restarts))]
