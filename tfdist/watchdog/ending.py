"""Whether the watcher may end the run, and what a report says about the end."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from tfdist.errors import HUNG
from tfdist.watchdog.messages import StatusMessage
from tfdist.watchdog.progress import here
from tfdist.watchdog.settings import WatchdogSettings


def may_end(settings: WatchdogSettings) -> bool:
    """Returns whether the watcher may end this process.

    Args:
        settings: The watcher's settings.
    """
    interactive = hasattr(sys, "ps1") or "ipykernel" in sys.modules
    return settings.on_hang == "end" and not interactive and not here.traced


def sentence(
    settings: WatchdogSettings, statuses: Iterable[StatusMessage], is_certain: bool
) -> str:
    """Returns the last sentence of a report: whether and when the run ends.

    Args:
        settings: The watcher's settings.
        statuses: The last status of each worker.
        is_certain: Whether the run cannot go on.
    """
    if not may_end(settings):
        return "The run is not ended: " + (
            f"TFDIST_ON_HANG={settings.on_hang}."
            if settings.on_hang != "end"
            else "this is an interactive session, or a debugger is attached."
        )
    if is_certain:
        return f"The run ends with status {HUNG}."
    longest = max((status.idle for status in statuses if status.is_overdue), default=0)
    end = settings.end_of(here.at, here.median)
    return (
        f"It may still go on. If not within {max(0.0, end - longest):.0f} s, it ends "
        f"with status {HUNG} (TFDIST_HANG_LIMIT={settings.limit:g})."
    )


def tell(text: str) -> None:
    """Prints a text for the user, to standard error.

    Args:
        text: The text.
    """
    print(text, file=sys.stderr, flush=True)
