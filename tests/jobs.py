"""Programs that run beside pytest, on as many processes as they need, shared by tests.

Starting TensorFlow takes seconds, so one job runs many cases and writes a file for each.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
QUIET = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"}
for _name in ("TF_CONFIG", "TFDIST_STRATEGY", "TFDIST_DROP_IN"):
    QUIET.pop(_name, None)


def tfdist_run(workers: int, *arguments: Any, options: Sequence[str] = ()) -> list[str]:
    """Gives the command that runs a module or script on several workers."""
    command = [sys.executable, "-m", "tfdist.cli", "run", "-n", str(workers), *options]
    return [*command, *map(str, arguments)]


class Job:
    """A process started in a group of its own, with what it prints kept in a file."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.log = log
        self.command = command
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=QUIET,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def wait_for(self, file: Path, seconds: float) -> Any:
        """Reads a pickled result once the job has written it."""
        deadline = time.monotonic() + seconds
        while not file.exists():
            ended = self.process.poll() is not None
            if (ended and not file.exists()) or time.monotonic() > deadline:
                state = f"ended with {self.process.returncode}" if ended else "still running"
                tail = self.log.read_text(errors="replace")[-3000:]
                raise AssertionError(f"no {file.name} from {self.command} ({state}):\n{tail}")
            time.sleep(0.1)
        return pickle.loads(file.read_bytes())

    def end(self) -> None:
        """Ends the process group, first kindly."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is None:
                os.killpg(self.process.pid, number)
                try:
                    self.process.wait(10)
                except subprocess.TimeoutExpired:
                    continue


@contextmanager
def running(command: Sequence[str], log: Path) -> Iterator[Job]:
    """Runs a job while the context lasts."""
    job = Job(command, log)
    try:
        yield job
    finally:
        job.end()


def write(result: Any, target: Path) -> None:
    """Writes a result so that a reader sees all of it or nothing."""
    part = target.with_name(f"{target.name}.part{os.getpid()}")
    part.write_bytes(pickle.dumps(result))
    part.replace(target)
