"""A worker process that a launcher starts: its command and its environment."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tfdist.cluster import CHIEF, WORKER


@dataclass(frozen=True)
class Worker:
    """A process to be started on this machine: a worker, or a task beside the workers.

    Attributes:
        index: Its position in its job, over all machines.
        command: The program and its arguments.
        environment: All of its environment variables.
        is_quiet: Whether to hide TensorFlow's messages about its own start; a log file has
            them in any case.
        job: `worker`; in a run with parameter servers `chief`, `worker` or `ps`; in an
            existing cluster also `evaluator`.
        serves: Whether it only executes requests of the chief; then it ends with the chief.
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
        """Whether the other workers can go on without it until it is started again."""
        return self.serves and self.job == WORKER

    @property
    def shows_progress(self) -> bool:
        """Whether this worker draws the progress bar."""
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
