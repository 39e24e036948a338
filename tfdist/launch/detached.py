"""Processes that a run's scripts have started and detached (`setsid`, `nohup`, daemons).

They are in no group of a worker, and nobody's children. All of them inherit a variable of the
environment, by which they are found, as Jenkins finds those of a build.
"""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tfdist.cluster import process_ids

RUN = "TFDIST_RUN"
"""The variable. A process without it is left alone."""

_TERMINATING_S = 2.0
_POLL_S = 0.02
_PROC = Path("/proc")


@dataclass(frozen=True)
class RunName:
    """The name of a launcher's start of workers, unlike any other.

    Attributes:
        launcher: The launcher's number.
        started: When the launcher started, as its kernel counts; "" if that is unknown.
        kernel: Which running kernel, and which namespace of process numbers.
        start: Another one for each start.
    """

    launcher: int
    started: str
    kernel: str
    start: str

    @classmethod
    def new(cls) -> RunName:
        """Returns a name for a start of this launcher."""
        pid = os.getpid()
        return cls(pid, process_ids.started(pid), process_ids.kernel(), uuid.uuid4().hex)

    @classmethod
    def read(cls, text: str) -> RunName | None:
        """Reads the value of the variable; None if tfdist did not write it.

        Args:
            text: The value.
        """
        parts = text.split("/")
        if len(parts) != 4 or not parts[0].isdecimal() or len(parts[0]) > 9:
            return None
        return cls(int(parts[0]), *parts[1:])

    def __str__(self) -> str:
        return "/".join((str(self.launcher), self.started, self.kernel, self.start))

    @property
    def has_lost_its_launcher(self) -> bool:
        """Whether the launcher is known to have ended."""
        is_known = bool(self.started) and self.kernel == process_ids.kernel() != ""
        return is_known and process_ids.started(self.launcher) != self.started


def end_detached(name: RunName, groups: Collection[int]) -> list[str]:
    """Ends what a start of workers has left, once its workers have ended.

    Args:
        name: The name of the start.
        groups: The workers' process groups, which have been killed.

    Returns:
        A line for each process.
    """
    ended = _end(lambda other: other == name, groups)
    return [f"tfdist: {one}, which the script had detached, is ended too." for one in ended]


def end_forgotten() -> list[str]:
    """Ends what runs have left whose launchers were killed (SIGKILL).

    Returns:
        A line for each process.
    """
    ended = _end(lambda other: other.has_lost_its_launcher)
    return [
        f"tfdist: {one}, left by a run whose launcher was killed, is ended." for one in ended
    ]


def _end(is_meant: Callable[[RunName], bool], groups: Collection[int] = ()) -> list[str]:
    """Ends processes: asks them first, then kills them, and those that they have started."""
    begun, told = time.monotonic(), dict[int, str]()
    while processes := dict(_processes(is_meant, groups)):
        is_late = time.monotonic() - begun > _TERMINATING_S
        if time.monotonic() - begun > 2 * _TERMINATING_S:
            break  # the kernel does not let them end: they wait for a disk
        for pid, command in processes.items():
            if is_late or pid not in told:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL if is_late else signal.SIGTERM)
                    # One that is stopped gets the signal when it goes on.
                    os.kill(pid, signal.SIGCONT)
            told[pid] = f"process {pid} ({command})"
        time.sleep(_POLL_S)
    return list(told.values())


def _processes(
    is_meant: Callable[[RunName], bool], groups: Collection[int]
) -> Iterator[tuple[int, str]]:
    """Yields the number and command of each process with the name of a run that is meant."""
    start = f"{RUN}=".encode()
    for folder in _PROC.iterdir() if _PROC.is_dir() else ():
        if not folder.name.isdecimal() or int(folder.name) == os.getpid():
            continue
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended, or is another user's
            continue
        values = [v[len(start) :] for v in variables if v.startswith(start)]
        name = RunName.read(values[0].decode(errors="replace")) if values else None
        if name is None or not is_meant(name):
            continue
        if not process_ids.started(int(folder.name)):
            continue
        with suppress(OSError):
            if os.getpgid(int(folder.name)) in groups:
                continue
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
            yield int(folder.name), command.decode(errors="replace").strip()[:60]
