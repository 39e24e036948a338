"""The memory of this process and of its machine, as Linux reports it."""

from __future__ import annotations

from pathlib import Path

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")
_MIB = 2**20


def used_mib() -> int | None:
    """Returns the memory of this process in MiB; None if the system does not report it."""
    kib = _field(PROC / "self/status", "VmRSS")
    return None if kib is None else kib // 1024


def left_mib() -> tuple[int, int] | None:
    """Returns the free and the total memory in MiB, of the container if that has less.

    Returns:
        None if the system does not report it.
    """
    available = _field(PROC / "meminfo", "MemAvailable")
    total = _field(PROC / "meminfo", "MemTotal")
    if available is None or total is None:
        return None
    available_mib, total_mib = available // 1024, total // 1024
    for folder, limit_name, used_name in (
        (CGROUP, "memory.max", "memory.current"),
        (CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        limit, used = _number(folder / limit_name), _number(folder / used_name)
        if limit is not None and used is not None and limit // _MIB < total_mib:
            # Cached files count as used, but the system frees them when it needs memory.
            used -= _field(folder / "memory.stat", "inactive_file") or 0
            available_mib = min(available_mib, max(0, limit - used) // _MIB)
            total_mib = limit // _MIB
    return available_mib, total_mib


def state_of(pid: int) -> str | None:
    """Returns the state of a process of this machine, a letter as in `ps`.

    Args:
        pid: The process's number.

    Returns:
        None if there is no such process; "?" if the system does not report it.
    """
    if not (PROC / "self").exists():
        return "?"
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return None


def _field(file: Path, name: str) -> int | None:
    try:
        for line in file.read_text().splitlines():
            if line.split()[0].rstrip(":") == name:
                return int(line.split()[1])
    except (OSError, ValueError, IndexError):
        pass
    return None


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None
