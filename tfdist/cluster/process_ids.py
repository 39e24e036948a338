"""Names a process of this machine so that no other one ever has the same name, as on Linux."""

from __future__ import annotations

import os
from pathlib import Path


def kernel() -> str:
    """Names the running kernel and the namespace of process numbers; "" if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def started(pid: int) -> str:
    """Returns when a process started, as its kernel counts; "" if it has ended.

    Numbers of processes are used again: only with this one they name a process.

    Args:
        pid: Its number.
    """
    fields = _fields(pid)
    return fields[19] if fields and fields[0] not in "ZX" else ""


def state(pid: int) -> str:
    """Returns the letter of a process's state, such as "T" for stopped; "" if unknown.

    Args:
        pid: Its number.
    """
    return (_fields(pid) or [""])[0]


def _fields(pid: int) -> list[str]:
    """Returns what the kernel says about a process, from its state on."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
