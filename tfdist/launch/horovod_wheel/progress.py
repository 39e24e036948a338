"""How far a build is, read from what make writes, and how it is shown."""

from __future__ import annotations

import itertools
import re
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

_PERCENT = re.compile(r"\s*\[ *(\d+)%\] (?:Building|Linking|Built target) ?(?:.*[ /])?(\S+)")
# The share of the time that has gone when make has come so far: Gloo's many files are small,
# Horovod's few are not.
_TIME = ((0, 0), (75, 30), (87, 50), (99, 80), (100, 100))


class Display:
    """Shows how far the work is: a bar on a terminal, elsewhere a line now and then."""

    def __init__(self, console: Console) -> None:
        """Shows nothing yet.

        Args:
            console: Where to write.
        """
        self._console = console
        self._shown = 0
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

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def begin(self, what: str) -> None:
        """Begins a step whose length is not known.

        Args:
            what: The step, such as "Installing".
        """
        if self._console.is_terminal:
            self._progress.update(
                self._task, description=what, total=None, percent="", detail=""
            )
        else:
            self._console.print(f"{what} ...")

    def advance(self, line: str) -> None:
        """Shows how far make is.

        Args:
            line: What it wrote.
        """
        found = progress(line)
        if found is None:
            return
        percent, file = time_share(found[0]), found[1]
        self._progress.update(
            self._task, description="Compiling", total=100, completed=percent,
            percent=f"{percent:3d} %", detail=file,
        )  # fmt: skip
        if not self._console.is_terminal and percent >= self._shown + 10:
            self._shown = percent - percent % 10
            self._console.print(f"Compiling: {self._shown} %")


def progress(line: str) -> tuple[int, str] | None:
    """Reads what make says of its progress.

    Args:
        line: A line of its output.

    Returns:
        The percentage and the file at work; None if the line is another.

    Example:
        >>> progress("[ 45%] Building CXX object gloo/CMakeFiles/gloo.dir/broadcast.cc.o")
        (45, 'broadcast.cc')
    """
    found = _PERCENT.match(line)
    return (int(found[1]), found[2].removesuffix(".o")) if found else None


def time_share(percent: int) -> int:
    """Turns make's percentage, which counts files, into one of the time that compiling takes.

    Args:
        percent: From 0 to 100.

    Returns:
        From 0 to 100.
    """
    for (x0, y0), (x1, y1) in itertools.pairwise(_TIME):
        if percent <= x1:
            return y0 + (y1 - y0) * (percent - x0) // (x1 - x0)
    return 100
