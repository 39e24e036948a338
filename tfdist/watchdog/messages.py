"""The status messages that the workers' watchers exchange."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields

from tfdist.watchdog.progress import FIRST_STEP, OUTSIDE, STEP

ENDED = "ended"


@dataclass(frozen=True)
class StatusMessage:
    """The status of a worker.

    Attributes:
        worker: Its number.
        task: Its name: "worker 1", "rank 1".
        beat: The number of the message; it grows with every message.
        clock: The time of the message, by `time.time()`.
        host: The machine's name.
        pid: The process's number.
        call: The innermost call that is under way, or the last one; None before the first.
        number: The number of this call, from 1.
        alone: Whether this call does not exchange with other workers.
        step: Steps begun in this call.
        at: The kind of work, as in `progress`; `ENDED` when the script has ended.
        phase: The same in words.
        idle: Seconds without progress.
        limit: The seconds without progress that are allowed.
        waits_for_data: Whether the step still waits for its data.
        is_exchanging: Whether the worker exchanges something with the others outside a step.
        ends_epoch: Whether one of tfdist's own callbacks runs at the end of an epoch.
        is_debugged: Whether a debugger holds the process.
        used_mib: The memory of the process.
        left_mib: The free memory of its machine.
        all_mib: The total memory of its machine.
        stack: The Python stacks, as lines.
    """

    worker: int
    task: str
    beat: int = 0
    clock: float = 0.0
    host: str = ""
    pid: int = 0
    call: str | None = None
    number: int = 0
    alone: bool = False
    step: int = 0
    at: str = ""
    phase: str = ""
    idle: float = 0.0
    limit: float = 0.0
    waits_for_data: bool = False
    is_exchanging: bool = False
    ends_epoch: bool = False
    is_debugged: bool = False
    used_mib: int | None = None
    left_mib: int | None = None
    all_mib: int | None = None
    stack: tuple[str, ...] = ()

    @property
    def is_overdue(self) -> bool:
        """Whether it has been without progress for too long."""
        return 0 < self.limit < self.idle

    @property
    def is_waiting(self) -> bool:
        """Whether it can do nothing but wait for other workers."""
        in_step = self.at in (STEP, FIRST_STEP) and not self.waits_for_data
        return self.is_inside and (in_step or self.is_exchanging)

    @property
    def is_inside(self) -> bool:
        """Whether it is inside a call that exchanges with other workers."""
        return self.call is not None and not self.alone and self.at not in (OUTSIDE, ENDED)

    @property
    def lacks_memory(self) -> bool:
        """Whether memory on its machine is nearly used up."""
        if self.left_mib is None or self.all_mib is None:
            return False
        return self.left_mib < max(64, self.all_mib // 25)

    def text(self) -> str:
        """Returns the message as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> StatusMessage:
        """Reads a message, also one of another version of tfdist.

        Args:
            text: The JSON that the method `text` returned.
        """
        field_names = {f.name for f in fields(cls)}
        content = {k: v for k, v in json.loads(text).items() if k in field_names}
        content["stack"] = tuple(content.get("stack", ()))
        return cls(**content)
