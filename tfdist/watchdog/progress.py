"""The progress of this process: written by the training loop, read by the watcher.

The training loop writes at every step, so the progress is kept in plain attributes.
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
"""The kinds of work of a process; each kind has its own limit."""

EXCHANGING, SAVING = "exchanging", "saving"
"""What a process may do between steps or before the first one."""

_WARM_UP = 3
_REMEMBERED = 200


class CountedData(Protocol):
    """Data of an epoch that counts its steps."""

    @property
    def steps_taken(self) -> int:
        """Steps of the epoch so far."""

    @property
    def begins(self) -> bool:
        """Whether no batch was drawn yet, so that buffers have to fill."""


@dataclass
class LoopCall:
    """One call of `fit`, `evaluate` or `predict`.

    Attributes:
        name: The function's name.
        number: The number of this call among the calls of several workers, from 1.
        alone: Whether it does not exchange with other workers.
        step: Training steps begun so far; in `evaluate` and `predict`, their own steps.
        validating: Whether the last step was a validation step.
    """

    name: str
    number: int
    alone: bool
    step: int = 0
    validating: bool = False


@dataclass
class Progress:
    """The progress of this process.

    Attributes:
        at: The kind of work, one of the constants above.
        since: When that work began, by `time.monotonic()`.
        call: The innermost call that is under way, or the last one.
        calls: Calls of several workers so far.
        failed: Whether the last call that ended has raised.
        traced: Whether a debugger or a profiler was tracing when the last call began.
        data_counts: Returns how many batches were drawn and how many steps are complete, also
            while a step runs. None if that cannot be known.
        durations: Seconds of the last steps, by kind.
        doing: `EXCHANGING`, `SAVING` or None.
        on_step: Called after each training step with the seconds before it and in it.
    """

    at: str = OUTSIDE
    since: float = field(default_factory=time.monotonic)
    call: LoopCall | None = None
    calls: int = 0
    failed: bool = False
    traced: bool = False
    data_counts: Callable[[], tuple[int, int]] | None = None
    durations: dict[str, deque[float]] = field(default_factory=dict)
    doing: str | None = None
    on_step: Callable[[float, float], None] | None = None

    def _enter(self, at: str) -> float:
        now = time.monotonic()
        seconds, self.since, self.at = now - self.since, now, at
        return seconds

    @contextlib.contextmanager
    def while_doing(self, activity: str) -> Iterator[None]:
        """Records what the main thread does while the context lasts.

        Args:
            activity: `EXCHANGING` or `SAVING`.
        """
        before, self.doing = self.doing, activity
        try:
            yield
        finally:
            self.doing = before

    @contextlib.contextmanager
    def calling(self, name: str, alone: bool) -> Iterator[LoopCall]:
        """Records a call of `fit`, `evaluate` or `predict`; calls may be nested in callbacks.

        Args:
            name: The function's name.
            alone: Whether it does not exchange with other workers.
        """
        before, at = self.call, self.at
        self.calls += not alone
        self.traced = sys.gettrace() is not None
        call = self.call = LoopCall(name, self.calls, alone)
        if before is None or at == OUTSIDE:
            self.durations = {}
        self._enter(START)
        try:
            yield call
        except BaseException:
            self.failed = True
            raise
        else:
            self.failed = False
        finally:
            self._enter(at)
            if at != OUTSIDE:
                self.call = before
            else:
                self.on_step = None

    def recording(self, function: Callable[[Any], Any], kind: str) -> Callable[[Any], Any]:
        """Wraps a function that makes steps, to record when steps begin and end.

        Args:
            function: Keras's loop calls it with its data: a `CountedData`, except in `predict`.
            kind: "training", "validation" or "prediction".
        """

        def recorded(data: Any) -> Any:
            call = self.call
            counted_data: CountedData | None = None if kind == "prediction" else data
            steps_taken = None if counted_data is None else counted_data.steps_taken
            begins = counted_data is not None and counted_data.begins
            durations = self.durations.setdefault(kind, deque(maxlen=_REMEMBERED))
            if call is not None:
                call.validating = kind == "validation" and call.name == "fit"
                if not call.validating:
                    call.step = call.step + 1 if steps_taken is None else steps_taken + 1
            # Rounds on Flower make steps without a call of `fit`. After them, nothing is waited
            # for.
            afterwards = OUTSIDE if self.at == OUTSIDE else BETWEEN
            between = self._enter(FIRST_STEP if begins or len(durations) < _WARM_UP else STEP)
            try:
                result = function(data)
            finally:
                seconds = self._enter(afterwards)
            durations.append(seconds)
            if kind == "training" and self.on_step is not None:
                self.on_step(between, seconds)
            return result

        return recorded

    @property
    def median(self) -> float | None:
        """The median seconds of a step of the last kind, or None if there were few steps."""
        call = self.call
        if call is None:
            return None
        kind = "validation" if call.validating or call.name == "evaluate" else "training"
        durations = self.durations.get(kind if call.name != "predict" else "prediction", ())
        return statistics.median(durations) if len(durations) >= _WARM_UP else None

    @property
    def waits_for_data(self) -> bool:
        """Whether the present step still waits for its data."""
        if self.at not in (STEP, FIRST_STEP) or self.data_counts is None:
            return False
        shares_drawn, steps_made = self.data_counts()
        return shares_drawn == steps_made


here = Progress()
"""The progress of this process."""
