"""Runs a step of a build as a process, writes its log, and finds the cause of a failure."""

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
from tfdist.launch.horovod_wheel.progress import ProgressDisplay
from tfdist.launch.output import LineSplitter
from tfdist.launch.signals import handling

# Make writes these lines; the compiler's messages are between them.
_COMMAND = re.compile(r"\[ *\d+%\]|g?make(?:\[\d+\])?: |/\S*/g?make |cd /|-- ")
_ERROR = re.compile(
    r"CMake Error\b|(?:fatal )?error ?(?:#\d+|C\d+)?: |.*\b(?:fatal )?error: |ERROR: "
    r"|.*: undefined reference to |.*\bNo space left on device|.*\bcannot find -l"
    r"|(?:\w+\.)*\w*(?:Error|Exception|Exit|Interrupt): "
)
# With these lines pip and make only repeat that an earlier command failed.
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
class StepRunner:
    """Runs steps in a temporary folder.

    Attributes:
        folder: The temporary folder.
        environ: The environment variables of the steps.
        display: Shows the progress.
    """

    folder: Path
    environ: Mapping[str, str]
    display: ProgressDisplay

    @property
    def log(self) -> Path:
        """The log file with the output of all steps."""
        return self.folder / "failure.log"

    def run(
        self, command: Sequence[str], step: str, limit_s: float, *, cwd: Path | None = None
    ) -> None:
        """Runs a step to its end.

        Args:
            command: The program and its arguments.
            step: The name of the step, as the subject of a sentence.
            limit_s: The most seconds.
            cwd: The folder to run it in; the temporary folder if None.

        Raises:
            BuildError: It failed or took too long; the message shows the cause.
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
            error_lines = tuple(text.splitlines()[-_LINES:])
            failure = f"within {limit_s / 60:.0f} minutes. Received: it was still running."
        else:
            error_lines = cause(text.splitlines())
            failure = f"with exit status 0. Received: exit status {status}."
        remedies = [tip for sign, tip in _REMEDIES.items() if sign in "\n".join(error_lines)]
        lines = (
            f"{step} must end {failure}",
            "",
            *(f"  | {line[:200]}" for line in error_lines),
            "",
            *remedies,
        )
        raise BuildError("\n".join(lines).rstrip())


@contextmanager
def step_runner(
    console: Console, environ: Mapping[str, str], log_folder: Path | None
) -> Iterator[StepRunner]:
    """Opens a temporary folder for steps, and stores their log if a step fails.

    Args:
        console: The console for the progress.
        environ: The environment variables of the steps.
        log_folder: The folder to store the log in, or None.
    """
    with (
        unwound_when_terminated(),
        tempfile.TemporaryDirectory(prefix="tfdist-", ignore_cleanup_errors=True) as name,
        ProgressDisplay(console) as display,
    ):
        folder = Path(name).resolve()
        # Killed compilers leave files in TMPDIR: here they vanish together with the folder.
        (folder / "tmp").mkdir()
        runner = StepRunner(folder, {**environ, "TMPDIR": str(folder / "tmp")}, display)
        try:
            yield runner
        except BuildError as error:
            log_note = _store_log(runner, log_folder)
            raise BuildError(f"{error}{log_note}") from None


def cause(lines: Sequence[str]) -> tuple[str, ...]:
    """Finds the lines of a log that say why the build failed.

    Args:
        lines: The whole log. The cause may be far from its end, because make lets other
            compilers finish after the first failure.

    Returns:
        The first error with its lines; the last lines if no line looks like an error.
    """
    # pip indents the output of other programs.
    lines = [line.removeprefix("  ") for line in lines]
    errors = (i for i, line in enumerate(lines) if _ERROR.match(line))
    first = next((i for i in errors if not _CONSEQUENCE.match(lines[i])), None)
    if first is None:
        return tuple(lines[-_LINES:])
    error_lines = [lines[first]]
    for line in lines[first + 1 : first + _LINES]:
        if _COMMAND.match(line) or _CONSEQUENCE.match(line):
            break
        error_lines.append(line)
    while error_lines and not error_lines[-1].strip():
        error_lines.pop()
    return tuple(error_lines)


def store_file(file: Path, folder: Path) -> Path:
    """Copies a file into a folder; other processes see the whole file or none."""
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
    """Runs a program to its end, and always ends its child processes too.

    Args:
        command: The program and its arguments.
        log: A file to which its output is appended.
        cwd: The folder to run it in.
        environ: Its environment variables.
        limit_s: The most seconds.
        on_line: Called with each line of its output.

    Returns:
        Its exit status, negative for a signal.

    Raises:
        TimeoutError: It took too long.
        OSError: It could not be started.
    """
    deadline = time.monotonic() + limit_s
    output = LineSplitter(log.open("ab", buffering=0))
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
    """Lets SIGTERM and SIGHUP unwind the program as Ctrl-C does, so that its steps end too."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    with handling((signal.SIGTERM, signal.SIGHUP), leave):
        yield


def _store_log(runner: StepRunner, folder: Path | None) -> str:
    if folder is None or not runner.log.exists():
        return ""
    try:
        return f"\n\nThe whole log: {store_file(runner.log, folder)}"
    except OSError as error:
        # A shared cache may be read-only; the user still sees the cause.
        return f"\n\nThe whole log could not be kept in {folder} ({error.strerror})."


def _output(process: subprocess.Popen[bytes], deadline: float) -> Iterator[bytes]:
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector, process.stdout as stream:
        selector.register(stream, selectors.EVENT_READ)
        while (seconds_left := deadline - time.monotonic()) > 0:
            if selector.select(seconds_left):
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
