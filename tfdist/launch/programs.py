"""Asks programs of the system, which may hang or be broken."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence

_NVIDIA_SMI_S = 20.0


def ask(
    command: Sequence[str], limit: float, environ: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a program that reads nothing, and returns its end with all that it wrote.

    Args:
        command: The program and its arguments.
        limit: Seconds after which it is killed.
        environ: Its environment variables; by default those of this process.

    Raises:
        OSError: It cannot be started.
        subprocess.TimeoutExpired: It took longer.
    """
    return subprocess.run(
        command,
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=limit,
        check=False,
    )


def nvidia_smi(environ: Mapping[str, str], *arguments: str) -> str:
    """Asks NVIDIA's program about the GPUs.

    Args:
        environ: The environment variables with which the program is looked for.
        *arguments: What to ask.

    Returns:
        What it wrote; empty if there is none, or if it is broken.
    """
    program = shutil.which("nvidia-smi", path=environ.get("PATH"))
    if program is None:
        return ""
    try:
        return ask([program, *arguments], _NVIDIA_SMI_S).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
