"""What a worker's watcher tells those of the others."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields

from tfdist.watchdog.progress import FIRST_STEP, OUTSIDE, STEP

ENDED = "ended"


@dataclass(frozen=True)
class StatusMessage:
    """Where a worker is.

    Attributes:
        worker: Its number.
        task: Its name: "worker 1", "rank 1".
        beat: Grows with every note.
        clock: When it was written, by `time.time()`.
        host: The machine's name.
        pid: The process's number.
        call: The innermost call that is under way, or the last one; None before the first.
        number: How many calls came before that, and it.
        alone: Whether that call does not exchange with other workers.
        step: Steps begun in it.
        at: What it is at; see `progress`. `ENDED` when its script has ended.
        phase: The same in words.
        idle: Seconds that nothing has gone on.
        limit: Seconds that this may take.
        waits_for_data: Whether the step has not drawn its data.
        is_exchanging: Whether it exchanges something with the others, outside of a step.
        is_debugged: Whether a debugger holds it.
        used_mib: Its memory.
        left_mib: Memory that is left on its machine.
        all_mib: All there is.
        stack: Where its Python stands.
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
    is_debugged: bool = False
    used_mib: int | None = None
    left_mib: int | None = None
    all_mib: int | None = None
    stack: tuple[str, ...] = ()

    @property
    def is_overdue(self) -> bool:
        """Whether what it is at takes too long."""
        return 0 < self.limit < self.idle

    @property
    def is_waiting(self) -> bool:
        """Whether it can only wait for other workers."""
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
        """Gives the note as a text."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> StatusMessage:
        """Reads what `text` gave, also in another version.

        Args:
            text: The text.
        """
        known = {f.name for f in fields(cls)}
        content = {k: v for k, v in json.loads(text).items() if k in known}
        content["stack"] = tuple(content.get("stack", ()))
        return cls(**content)
