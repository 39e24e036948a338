"""A worker process, as it is started."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tfdist.cluster import CHIEF, WORKER


@dataclass(frozen=True)
class Worker:
    """A process to be started on this machine: a worker, or a task beside the workers.

    Attributes:
        index: Its position in its job, on all machines.
        command: The program and its arguments.
        environment: All of its environment variables.
        is_quiet: Whether TensorFlow's notes about its own start are left out of what is
            shown; a log file has them all the same.
        job: `worker`, in a run with parameter servers `chief`, `worker` or `ps`, and in a
            cluster that was there before also `evaluator`.
        serves: Whether it only does what the chief asks for: it ends with the chief.
    """

    index: int
    command: tuple[str, ...]
    environment: Mapping[str, str]
    is_quiet: bool = False
    job: str = WORKER
    serves: bool = False

    @property
    def task(self) -> str:
        """Its name in messages, such as `"worker 1"` or `"chief"`."""
        return CHIEF if self.job == CHIEF else f"{self.job} {self.index}"

    @property
    def log_name(self) -> str:
        """The name of the file that `--log-dir` keeps its output in."""
        return f"{self.task.replace(' ', '-')}.log"

    @property
    def is_replaceable(self) -> bool:
        """Whether the others go on without it until it is back."""
        return self.serves and self.job == WORKER

    @property
    def shows_progress(self) -> bool:
        """Whether it is the one that draws a progress bar."""
        return self.index == 0 and not self.serves


def script_command(arguments: Sequence[str], module: bool = False) -> tuple[str, ...]:
    """Returns the command that runs a user's script inside a worker.

    Args:
        arguments: The script and its arguments.
        module: Whether the first is the name of a module, as after `python -m`.
    """
    return (
        sys.executable,
        "-m",
        "tfdist.scripts.worker_main",
        *(("-m",) if module else ()),
        *arguments,
    )
