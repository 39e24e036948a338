"""The status messages that the workers' watchers exchange."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from tfdist.cluster import strict_json
from tfdist.watchdog.progress import FIRST_STEP, OUTSIDE, STEP

ENDED = "ended"

_MOST_BYTES = 1 << 20


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
        # A path may hold bytes that are no characters.
        return json.dumps(asdict(self), ensure_ascii=False).encode("utf-8", "replace").decode()

    @classmethod
    def read(cls, text: str) -> StatusMessage:
        """Reads a message, also one of another version of tfdist.

        Args:
            text: The JSON that the method `text` returned.

        Raises:
            ValueError: It is none.
        """
        content = _loaded(text)
        types = {f.name: str(f.type) for f in fields(cls)}
        content = {k: v for k, v in content.items() if k in types}
        for name, value in content.items():
            if not _CHECKS[types[name]](value):
                raise ValueError(f"{name} of a status message is {str(value)[:40]}")
        if not {"worker", "task"} <= content.keys():
            raise ValueError("a status message names no worker")
        content["stack"] = tuple(content.get("stack", ()))
        return cls(**content)


@dataclass(frozen=True)
class HangRequest:
    """What a watcher asks of all workers, because the run hangs.

    Attributes:
        name: The name of the request, another one for each.
        state: "ask" for their stacks, or "end".
        by: The number of the worker that asks for the end.
    """

    name: str
    state: str
    by: int | None = None

    def text(self) -> str:
        """Returns the request as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> HangRequest:
        """Reads a request.

        Args:
            text: The JSON that the method `text` returned.

        Raises:
            ValueError: It is none.
        """
        content = _loaded(text)
        name, state, by = (content.get(key) for key in ("name", "state", "by"))
        if (
            not isinstance(name, str)
            or not isinstance(state, str)
            or not _is_number_or_none(by)
        ):
            raise ValueError("not a request of a watcher")
        return cls(name, state, by)


def _loaded(text: str) -> dict[str, Any]:
    content = strict_json.loads(text.encode(), _MOST_BYTES, most_depth=4)
    if not isinstance(content, dict):
        raise ValueError("not a message of a watcher")
    return content


def _is_number(value: Any) -> bool:
    return type(value) is int and abs(value) < 1 << 62


def _is_number_or_none(value: Any) -> bool:
    return value is None or _is_number(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_CHECKS: Mapping[str, Callable[[Any], bool]] = {
    "int": _is_number,
    "int | None": _is_number_or_none,
    "float": lambda value: type(value) in (int, float) and math.isfinite(value),
    "bool": lambda value: isinstance(value, bool),
    "str": _is_text,
    "str | None": lambda value: value is None or _is_text(value),
    "tuple[str, ...]": lambda value: isinstance(value, list) and all(map(_is_text, value)),
}
