"""How far this process is: noted by what trains, read by the watcher.

Notes are plain attributes, since they are written at every step.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

STEP, FIRST_STEP, BETWEEN, START, OUTSIDE = "step", "first step", "between", "start", "outside"
"""What a process can be at: they have limits of their own."""

EXCHANGING, SAVING = "exchanging", "saving"
"""What a process may do besides, between steps or before them."""

_WARM_UP = 3
_REMEMBERED = 200


class Counted(Protocol):
    """Data that counts the steps made of it."""

    @property
    def steps_taken(self) -> int:
        """Steps that were made of an epoch."""

    @property
    def begins(self) -> bool:
        """Whether nothing was drawn yet, and buffers have to fill."""


@dataclass
class Call:
    """One call of `fit`, `evaluate` or `predict`.

    Attributes:
        name: Of the function.
        number: How many calls of several workers came before it, and it.
        alone: Whether it does not exchange with other workers.
        step: Steps that were begun in training, or where there is none in evaluation.
        validating: Whether the last step was one of validation.
    """

    name: str
    number: int
    alone: bool
    step: int = 0
    validating: bool = False


@dataclass
class Progress:
    """Where this process is.

    Attributes:
        at: One of the constants above.
        since: When that began, by `time.monotonic()`.
        call: The innermost call that is under way, or the last one.
        calls: Calls of several workers so far.
        traced: Whether a debugger or a profiler was tracing when the last call began.
        counted: Gives how many shares were drawn and how many steps were made of them, also
            while a step is made; None where that cannot be known.
        durations: Seconds of the last steps, by kind.
        doing: One of `EXCHANGING` and `SAVING`, or None.
        noting: Called after each training step with the seconds before it and in it.
    """

    at: str = OUTSIDE
    since: float = field(default_factory=time.monotonic)
    call: Call | None = None
    calls: int = 0
    traced: bool = False
    counted: Callable[[], tuple[int, int]] | None = None
    durations: dict[str, deque[float]] = field(default_factory=dict)
    doing: str | None = None
    noting: Callable[[float, float], None] | None = None

    def _go(self, at: str) -> float:
        now = time.monotonic()
        lasted, self.since, self.at = now - self.since, now, at
        return lasted

    @contextlib.contextmanager
    def while_doing(self, what: str) -> Iterator[None]:
        """Marks what the main thread does while the context lasts.

        Args:
            what: `EXCHANGING` or `SAVING`.
        """
        before, self.doing = self.doing, what
        try:
            yield
        finally:
            self.doing = before

    @contextlib.contextmanager
    def calling(self, name: str, alone: bool) -> Iterator[Call]:
        """Notes a call of `fit`, `evaluate` or `predict`, which a callback may make too.

        Args:
            name: Of the function.
            alone: Whether it does not exchange with other workers.
        """
        before, at = self.call, self.at
        self.calls += not alone
        self.traced = sys.gettrace() is not None
        call = self.call = Call(name, self.calls, alone)
        if before is None or at == OUTSIDE:
            self.durations = {}
        self._go(START)
        try:
            yield call
        finally:
            self._go(at)
            if at != OUTSIDE:
                self.call = before
            else:
                self.noting = None

    def making(self, function: Callable[[Any], Any], kind: str) -> Callable[[Any], Any]:
        """Wraps what Keras's loop calls, to note when steps begin and end.

        Args:
            function: Makes some steps; of a `Counted`, but for predictions.
            kind: "training", "validation" or "prediction".
        """

        def noted(data: Any) -> Any:
            call = self.call
            counted: Counted | None = None if kind == "prediction" else data
            taken = None if counted is None else counted.steps_taken
            begins = counted is not None and counted.begins
            known = self.durations.setdefault(kind, deque(maxlen=_REMEMBERED))
            if call is not None:
                call.validating = kind == "validation" and call.name == "fit"
                if not call.validating:
                    call.step = call.step + 1 if taken is None else taken + 1
            between = self._go(FIRST_STEP if begins or len(known) < _WARM_UP else STEP)
            try:
                result = function(data)
            finally:
                lasted = self._go(BETWEEN)
            known.append(lasted)
            if kind == "training" and self.noting is not None:
                self.noting(between, lasted)
            return result

        return noted

    @property
    def median(self) -> float | None:
        """Seconds that a step usually takes, of the kind that was made last."""
        call = self.call
        if call is None:
            return None
        kind = "validation" if call.validating or call.name == "evaluate" else "training"
        known = self.durations.get(kind if call.name != "predict" else "prediction", ())
        return statistics.median(known) if len(known) >= _WARM_UP else None

    @property
    def waits_for_data(self) -> bool:
        """Whether the step that is under way has not drawn its data yet."""
        if self.at not in (STEP, FIRST_STEP) or self.counted is None:
            return False
        drawn, made = self.counted()
        return drawn == made


here = Progress()
"""This process's."""
