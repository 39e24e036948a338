"""What a test may leave behind: nothing. Variables, threads, processes and open ports."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from dataclasses import dataclass

import psutil

_ADOPT_ORPHANS = 36  # PR_SET_CHILD_SUBREAPER
_PATIENCE_S = 5.0
# Threads of the process that live as long as it does: tfdist's watcher, and pytest's own.
_LASTING = ("tfdist-watch", "Dummy-", "execnet", "asyncio")


def adopt_orphans() -> None:
    """Makes processes whose parent has ended children of this one, where Linux can."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "prctl"):
        libc.prctl(_ADOPT_ORPHANS, 1, 0, 0, 0)


@dataclass(frozen=True)
class Surroundings:
    """What there is around a test.

    Attributes:
        variables: The environment.
        threads: By number, their names.
        processes: By number and start, the commands of the children and of theirs.
        ports: On which this process listens.
    """

    variables: dict[str, str]
    threads: dict[int | None, str]
    processes: dict[tuple[int, float], str]
    ports: frozenset[int]

    @classmethod
    def now(cls) -> Surroundings:
        """Looks around."""
        here = psutil.Process()
        processes = {}
        for child in here.children(recursive=True):
            try:
                if child.status() != psutil.STATUS_ZOMBIE:
                    processes[child.pid, child.create_time()] = " ".join(child.cmdline())
            except psutil.NoSuchProcess:
                continue
        ports = {
            connection.laddr.port
            for connection in here.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
        variables = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}
        threads = {t.ident: t.name for t in threading.enumerate()}
        return cls(variables, threads, processes, frozenset(ports))

    def left(self) -> list[str]:
        """Says what has come since, and waits a little for what is about to go."""
        deadline = time.monotonic() + _PATIENCE_S
        while (found := self._new()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return found

    def _new(self) -> list[str]:
        now = Surroundings.now()
        return [
            *(
                f"variable {name}"
                for name in sorted(self.variables.keys() | now.variables.keys())
                if self.variables.get(name) != now.variables.get(name)
            ),
            *(
                f"thread {name}"
                for ident, name in now.threads.items()
                if ident not in self.threads and not name.startswith(_LASTING)
            ),
            *(
                f"process {pid}: {command}"
                for (pid, start), command in now.processes.items()
                if (pid, start) not in self.processes
            ),
            *(f"port {port}" for port in now.ports - self.ports),
        ]
