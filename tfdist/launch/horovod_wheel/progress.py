"""The progress of a build: read from the output of make, and shown."""

from __future__ import annotations

import itertools
import re
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

_PERCENT = re.compile(r"\s*\[ *(\d+)%\] (?:Building|Linking|Built target) ?(?:.*[ /])?(\S+)")
# Pairs of make's percentage and the percentage of the time then spent: Gloo has many small
# files, Horovod has a few large ones.
_TIME = ((0, 0), (75, 30), (87, 50), (99, 80), (100, 100))


class ProgressDisplay:
    """Shows the progress: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console) -> None:
        """Prepares the display; it shows nothing yet.

        Args:
            console: The console to write to.
        """
        self._console = console
        self._percent_shown = 0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(30),
            TextColumn("{task.fields[percent]}"),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[detail]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("Starting", total=None, percent="", detail="")

    def __enter__(self) -> ProgressDisplay:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def begin(self, step_name: str) -> None:
        """Begins a step whose length is not known.

        Args:
            step_name: The step, such as "Installing".
        """
        if self._console.is_terminal:
            self._progress.update(
                self._task, description=step_name, total=None, percent="", detail=""
            )
        else:
            self._console.print(f"{step_name} ...")

    def advance(self, line: str) -> None:
        """Shows the progress of make.

        Args:
            line: A line of make's output.
        """
        parsed = progress(line)
        if parsed is None:
            return
        percent, file = time_share(parsed[0]), parsed[1]
        self._progress.update(
            self._task, description="Compiling", total=100, completed=percent,
            percent=f"{percent:3d} %", detail=file,
        )  # fmt: skip
        if not self._console.is_terminal and percent >= self._percent_shown + 10:
            self._percent_shown = percent - percent % 10
            self._console.print(f"Compiling: {self._percent_shown} %")


def progress(line: str) -> tuple[int, str] | None:
    """Reads the progress from a line of make's output.

    Args:
        line: The line.

    Returns:
        The percentage and the file that is compiled; None if the line shows no progress.

    Example:
        >>> progress("[ 45%] Building CXX object gloo/CMakeFiles/gloo.dir/broadcast.cc.o")
        (45, 'broadcast.cc')
    """
    parsed = _PERCENT.match(line)
    return (int(parsed[1]), parsed[2].removesuffix(".o")) if parsed else None


def time_share(percent: int) -> int:
    """Turns make's percentage, which counts files, into the percentage of the time.

    Args:
        percent: Make's percentage, from 0 to 100.

    Returns:
        From 0 to 100.
    """
    for (x0, y0), (x1, y1) in itertools.pairwise(_TIME):
        if percent <= x1:
            return y0 + (y1 - y0) * (percent - x0) // (x1 - x0)
    return 100
