"""Programs that tests start, and what those need."""

from __future__ import annotations

import os
import pickle
import random
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parent.parent
QUIET = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"}
for _name in ("TF_CONFIG", "TFDIST_STRATEGY", "TFDIST_DROP_IN"):
    QUIET.pop(_name, None)


def tfdist_run(workers: int, *arguments: Any, options: Sequence[str] = ()) -> list[str]:
    """Gives the command that runs a module or script on several workers, and shows all."""
    command = [sys.executable, "-m", "tfdist.cli", "run", "-n", str(workers)]
    return [*command, "--output", "all", *options, *map(str, arguments)]


def free_port() -> int:
    """Finds the first of ten free ports in a row, for what counts on from `--port`.

    Any connection of this machine may take a port from the kernel's own range, 32768 and up,
    before a test listens there; below 26000 are the fixed ports of some tests.
    """
    for first in random.sample(range(26_001, 32_001, 10), 50):
        with ExitStack() as held:
            try:
                for port in range(first - 1, first + 9):  # launchers meet one below
                    held.enter_context(socket.socket()).bind(("", port))
            except OSError:
                continue
        return first
    raise AssertionError("no ten free ports in a row from 26000 to 32000")


def is_gone(pid: int) -> bool:
    """Tells whether a process has ended, whether or not anybody has asked how."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def finished(
    command: Sequence[str],
    seconds: float,
    environ: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> tuple[int, str]:
    """Runs a command to its end and gives its exit status and all that it printed.

    Args:
        command: The program and its arguments.
        seconds: How long it may run.
        environ: Variables besides `QUIET`.
        folder: Where it works; None for here.
    """
    done = subprocess.run(
        command,
        cwd=folder,
        env={**QUIET, **(environ or {})},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def write(result: Any, target: Path) -> None:
    """Writes a result so that a reader sees all of it or nothing."""
    part = target.with_name(f"{target.name}.part{os.getpid()}")
    part.write_bytes(pickle.dumps(result))
    part.replace(target)
