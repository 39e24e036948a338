"""One step of a build: its process, its log, and why it failed."""

from __future__ import annotations

import os
import re
import selectors
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rich.console import Console

from tfdist.errors import BuildError
from tfdist.launch.horovod_wheel.progress import Display
from tfdist.launch.output import Lines
from tfdist.launch.signals import handled

# What make writes for each file, between which the compiler's words stand.
_COMMAND = re.compile(r"\[ *\d+%\]|g?make(?:\[\d+\])?: |/\S*/g?make |cd /|-- ")
_ERROR = re.compile(
    r"CMake Error\b|(?:fatal )?error ?(?:#\d+|C\d+)?: |.*\b(?:fatal )?error: |ERROR: "
    r"|.*: undefined reference to |.*\bNo space left on device|.*\bcannot find -l"
    r"|(?:\w+\.)*\w*(?:Error|Exception|Exit|Interrupt): "
)
# pip and make only pass on that something before them failed.
_CONSEQUENCE = re.compile(r"error: subprocess-exited|ERROR: Failed (?:building|to build)")
_LINES = 12
_REMEDIES = {
    "No space left on device": "Set TMPDIR to a folder with 1 GB of free space.",
    "Killed signal": "Memory ran out: compile one file at a time, with `--jobs 1`.",
    "No matching distribution": "pip must reach its package index: check the network, the "
    "proxy and pip's settings.",
    "No module named pip": "Install pip into this environment: `python -m ensurepip`.",
    "externally-managed-environment": "Work in a virtual environment: `python -m venv`.",
}
_ENDING = ((signal.SIGTERM, 6.0), (signal.SIGKILL, 5.0))


@dataclass(frozen=True)
class Workshop:
    """Where steps run.

    Attributes:
        folder: A temporary folder.
        environ: The variables of the steps.
        display: What shows how far they are.
    """

    folder: Path
    environ: Mapping[str, str]
    display: Display

    @property
    def log(self) -> Path:
        """What all steps wrote."""
        return self.folder / "failure.log"

    def run(
        self, command: Sequence[str], what: str, limit_s: float, *, cwd: Path | None = None
    ) -> None:
        """Runs a step to its end.

        Args:
            command: The program and its arguments.
            what: What it does, as the subject of a sentence.
            limit_s: How many seconds it may take.
            cwd: Where to run it, if not in the temporary folder.

        Raises:
            BuildError: It failed or took too long; the cause is shown.
        """
        cwd = cwd or self.folder
        start = self.log.stat().st_size if self.log.exists() else 0
        try:
            status: int | None = run_step(
                command, self.log, cwd=cwd, environ=self.environ, limit_s=limit_s,
                on_line=self.display.advance,
            )  # fmt: skip
        except TimeoutError:
            status = None
        if status == 0:
            return
        text = self.log.read_bytes()[start:].decode(errors="replace").replace(f"{cwd}/", "")
        if status is None:
            told = tuple(text.splitlines()[-_LINES:])
            failure = f"within {limit_s / 60:.0f} minutes. Received: it was still running."
        else:
            told = cause(text.splitlines())
            failure = f"with exit status 0. Received: exit status {status}."
        remedies = [tip for sign, tip in _REMEDIES.items() if sign in "\n".join(told)]
        lines = (
            f"{what} must end {failure}",
            "",
            *(f"  | {line[:200]}" for line in told),
            "",
            *remedies,
        )
        raise BuildError("\n".join(lines).rstrip())


@contextmanager
def workshop(
    console: Console, environ: Mapping[str, str], log_folder: Path | None
) -> Iterator[Workshop]:
    """Opens a temporary folder for steps, and keeps their log if one of them fails.

    Args:
        console: Where to show how far they are.
        environ: Their variables.
        log_folder: Where to keep the log; nowhere if None.
    """
    with (
        unwound_when_terminated(),
        tempfile.TemporaryDirectory(prefix="tfdist-", ignore_cleanup_errors=True) as name,
        Display(console) as display,
    ):
        folder = Path(name).resolve()
        # What compilers and pip leave there when they are ended goes with the folder.
        (folder / "tmp").mkdir()
        shop = Workshop(folder, {**environ, "TMPDIR": str(folder / "tmp")}, display)
        try:
            yield shop
        except BuildError as error:
            kept = _kept_log(shop, log_folder)
            raise BuildError(f"{error}{kept}") from None


def cause(lines: Sequence[str]) -> tuple[str, ...]:
    """Finds the lines of a log that say why the build failed.

    Args:
        lines: The whole log; after the first failure make lets its other compilers finish,
            so that the cause may stand far from the end.

    Returns:
        The first error and what belongs to it; the last lines if none looks like an error.
    """
    # pip indents what others wrote.
    lines = [line.removeprefix("  ") for line in lines]
    errors = (i for i, line in enumerate(lines) if _ERROR.match(line))
    first = next((i for i in errors if not _CONSEQUENCE.match(lines[i])), None)
    if first is None:
        return tuple(lines[-_LINES:])
    told = [lines[first]]
    for line in lines[first + 1 : first + _LINES]:
        if _COMMAND.match(line) or _CONSEQUENCE.match(line):
            break
        told.append(line)
    while told and not told[-1].strip():
        told.pop()
    return tuple(told)


def keep(file: Path, folder: Path) -> Path:
    """Copies a file into the cache, where all of it is to be seen or nothing."""
    target = folder / file.name
    part = folder / f".{file.name}.{os.getpid()}.part"
    shutil.copyfile(file, part)
    os.replace(part, target)
    return target


def run_step(
    command: Sequence[str],
    log: Path,
    *,
    cwd: Path,
    environ: Mapping[str, str],
    limit_s: float,
    on_line: Callable[[str], None] = lambda line: None,
) -> int:
    """Runs a program to its end; with it end its children, whatever happens here.

    Args:
        command: The program and its arguments.
        log: A file to which its output is appended.
        cwd: Where to run it.
        environ: Its variables.
        limit_s: How many seconds it may take.
        on_line: Is given each line of its output.

    Returns:
        Its exit status, negative for a signal.

    Raises:
        TimeoutError: It took too long.
        OSError: It could not be started.
    """
    deadline = time.monotonic() + limit_s
    output = Lines(log.open("ab"))
    process = subprocess.Popen(
        command, cwd=cwd, env=dict(environ), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        for data in _output(process, deadline):
            for line in output.feed(data):
                on_line(line)
        return process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise TimeoutError from None
    finally:
        _end(process)
        output.finish()


@contextmanager
def unwound_when_terminated() -> Iterator[None]:
    """Lets SIGTERM and SIGHUP unwind the program as Ctrl-C does, so no step outlives it."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    with handled((signal.SIGTERM, signal.SIGHUP), leave):
        yield


def _kept_log(shop: Workshop, folder: Path | None) -> str:
    if folder is None or not shop.log.exists():
        return ""
    try:
        return f"\n\nThe whole log: {keep(shop.log, folder)}"
    except OSError as error:
        # A shared cache may be there for reading only; the cause is shown all the same.
        return f"\n\nThe whole log could not be kept in {folder} ({error.strerror})."


def _output(process: subprocess.Popen[bytes], deadline: float) -> Iterator[bytes]:
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector, process.stdout as stream:
        selector.register(stream, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            if selector.select(left):
                data = os.read(stream.fileno(), 65536)
                if not data:
                    return
                yield data
    raise TimeoutError


def _end(process: subprocess.Popen[bytes]) -> None:
    for ending, seconds in _ENDING:
        number: int = ending
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            process.poll()
            try:
                os.killpg(process.pid, number)
            except (ProcessLookupError, PermissionError):
                # macOS answers the latter for a group of which only zombies are left.
                return
            number = 0
            time.sleep(0.05)
