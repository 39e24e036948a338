"""The watcher's settings: how long a hang is, and what happens then."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

from tfdist.errors import ArgumentError
from tfdist.watchdog import progress

HANG_LIMIT = "TFDIST_HANG_LIMIT"
"""Environment variable: a run without progress for this many seconds may hang.

The default is 60; 0 switches the watcher off.
"""

ON_HANG = "TFDIST_ON_HANG"
"""Environment variable: "end" the run after the report, or "report" only."""

_ACTIONS = ("end", "report")
_STEPS = 20  # a step that takes this many median steps is too long
_GENEROUS = 10  # factor for work that may take long: tracing, filling buffers, callbacks
_END = 10  # if no cause is certain, the run ends after this many limits in a step
_LONGEST = 3  # ... and after this many generous limits outside a step


@dataclass(frozen=True)
class WatchdogSettings:
    """The settings of the watcher.

    Attributes:
        limit: The least seconds without progress that count as a hang; 0 switches it off.
        on_hang: "end" or "report".
    """

    limit: float = 60.0
    on_hang: str = "end"

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> WatchdogSettings:
        """Reads the settings from environment variables.

        Args:
            environ: The environment variables.

        Raises:
            ArgumentError: A value is invalid.
        """
        limit = _seconds(HANG_LIMIT, environ.get(HANG_LIMIT, "60"))
        on_hang = _action(ON_HANG, environ.get(ON_HANG, "end"))
        return cls(limit, on_hang)

    def with_values(self, hang_limit: float | None, on_hang: str | None) -> WatchdogSettings:
        """Returns the settings with other values; None keeps a value.

        Args:
            hang_limit: Seconds.
            on_hang: "end" or "report".

        Raises:
            ArgumentError: A value is invalid.
        """
        settings = self
        if hang_limit is not None:
            settings = replace(settings, limit=_seconds("hang_limit", hang_limit))
        if on_hang is not None:
            settings = replace(settings, on_hang=_action("on_hang", on_hang))
        return settings

    def limit_of(self, at: str, median: float | None) -> float:
        """Returns the seconds without progress after which a hang is reported.

        Args:
            at: The kind of work of the process.
            median: The median seconds of a step, if known.
        """
        from_median = max(self.limit, _STEPS * (median or 0.0))
        return from_median if at == progress.STEP else max(_GENEROUS * self.limit, from_median)

    def end_of(self, at: str, median: float | None) -> float:
        """Returns the seconds after which the run ends if no cause is certain.

        Args:
            at: The kind of work of the process.
            median: The median seconds of a step, if known.
        """
        factor = _END if at == progress.STEP else _LONGEST
        return factor * self.limit_of(at, median)


def _seconds(name: str, value: object) -> float:
    try:
        seconds = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        seconds = -1.0
    if not 0 <= seconds < float("inf") or isinstance(value, bool):
        raise ArgumentError(
            f"`{name}` must be a number of seconds, 0 or more; 0 switches the watcher off. "
            f"Received: {name}={value!r}."
        )
    return seconds


def _action(name: str, value: object) -> str:
    if value not in _ACTIONS:
        raise ArgumentError(f"`{name}` must be one of {_ACTIONS}. Received: {name}={value!r}.")
    return str(value)
