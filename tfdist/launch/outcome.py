"""How a run ended."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from tfdist.launch.cause import Failure
from tfdist.launch.restarts import Restart, RestartCause


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        status: The exit status for the launcher.
        failure: The worker's failure that ended the run; None if no worker failed.
        finished: The tasks that had already ended well when it failed.
        interrupted: The signal sent to the launcher, 0 if there was none.
        restarts: The restarts of the run.
        is_repeated: Whether the failure came twice in a row at the same step.
        elsewhere: The cause of the end, if it was on another machine.
    """

    status: int
    failure: Failure | None = None
    finished: tuple[str, ...] = ()
    interrupted: int = 0
    restarts: tuple[Restart, ...] = ()
    is_repeated: bool = False
    elsewhere: RestartCause | None = None

    @property
    def what(self) -> str:
        """The cause of the end in a sentence; empty if all workers have succeeded."""
        if self.interrupted:
            name = signal.Signals(self.interrupted).name
            return f"The launcher got {name}."
        if self.failure is not None:
            return self.failure.describe()
        return "" if self.elsewhere is None else self.elsewhere.what
