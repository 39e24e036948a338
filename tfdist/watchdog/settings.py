"""How long without progress is a hang, and what is done then."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

from tfdist.errors import ArgumentError
from tfdist.watchdog import progress

HANG_LIMIT = "TFDIST_HANG_LIMIT"
"""Environment variable: the least seconds without progress that are a hang; 60, 0 for off."""

ON_HANG = "TFDIST_ON_HANG"
"""Environment variable: "end" the run after the report, or "report" only."""

_ACTIONS = ("end", "report")
_STEPS = 20  # so many times the median step is too long for one
_GENEROUS = 10  # what may take long for good reasons: tracing, filling buffers, callbacks
_END = 10  # if nothing is certain, so many limits are waited before the end
_LONGEST = 3  # but no longer than so many generous limits


@dataclass(frozen=True)
class Settings:
    """Of the watcher.

    Attributes:
        limit: Seconds; 0 switches it off.
        on_hang: "end" or "report".
    """

    limit: float = 60.0
    on_hang: str = "end"

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """Reads the variables.

        Args:
            environ: Where they are.

        Raises:
            ArgumentError: One has no meaning.
        """
        limit = _seconds(HANG_LIMIT, environ.get(HANG_LIMIT, "60"))
        on_hang = _action(ON_HANG, environ.get(ON_HANG, "end"))
        return cls(limit, on_hang)

    def changed(self, hang_limit: float | None, on_hang: str | None) -> Settings:
        """Gives settings with what is not None.

        Args:
            hang_limit: Seconds.
            on_hang: "end" or "report".

        Raises:
            ArgumentError: One has no meaning.
        """
        changed = self
        if hang_limit is not None:
            changed = replace(changed, limit=_seconds("hang_limit", hang_limit))
        if on_hang is not None:
            changed = replace(changed, on_hang=_action("on_hang", on_hang))
        return changed

    def limit_of(self, at: str, median: float | None) -> float:
        """Gives the seconds after which something is reported.

        Args:
            at: What the process is at.
            median: Seconds of its usual step, if known.
        """
        learned = max(self.limit, _STEPS * (median or 0.0))
        return learned if at == progress.STEP else max(_GENEROUS * self.limit, learned)

    def end_of(self, at: str, median: float | None) -> float:
        """Gives the seconds after which the run ends, if the cause is not certain.

        Args:
            at: What the process is at.
            median: Seconds of its usual step, if known.
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
