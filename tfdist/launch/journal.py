"""What happens in a run, for programs: a file of events beside the logs, and its health."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfdist.cluster import CHIEF, WORKER
from tfdist.errors import TfdistError
from tfdist.launch.cause import Failure
from tfdist.launch.logs import LogFile
from tfdist.launch.member import StartedWorker
from tfdist.launch.restarts import RestartCause
from tfdist.launch.worker import Worker

ALIVE_S = 30.0
"""A launcher that has not looked after its workers for this many seconds is not alive."""


@dataclass(frozen=True)
class WorkerState:
    """The state of a worker of this machine.

    Attributes:
        task: Its name.
        pid: Its process number.
        is_running: Whether it runs.
        steps_made: Training steps that it has made; None if it only serves.
        epoch: The epoch of its last step, from 1; 0 before the first.
        step: The steps that it has made in that epoch.
    """

    task: str
    pid: int
    is_running: bool
    steps_made: int | None
    epoch: int
    step: int


def events_name(workers: Sequence[Worker]) -> str:
    """Names the file of events: launchers that share a folder must not share it.

    Args:
        workers: The workers of this machine.
    """
    first = workers[0]
    is_first = first.job == CHIEF or (first.job == WORKER and not first.index)
    return "events.jsonl" if is_first else f"events-{first.task.replace(' ', '-')}.jsonl"


def state_of_worker(member: StartedWorker) -> WorkerState:
    """Returns the state of a started worker.

    Args:
        member: The worker.
    """
    progress = member.heartbeat.read()
    return WorkerState(
        member.worker.task,
        member.process.pid,
        member.ended_at is None,
        None if member.worker.serves else progress.steps_made,
        progress.epoch + 1 if progress.steps_made else 0,
        progress.step,
    )


def _lost(lines: int) -> str:
    return json.dumps({"time": time.time(), "event": "lost", "lines": lines})


class Journal:
    """Writes events, and knows the health of the run.

    Args:
        log_dir: The folder of the log files, which gets the file of events; None for none.
        name: The name of the file of events.
    """

    def __init__(self, log_dir: Path | None = None, name: str = "events.jsonl") -> None:
        self._path = None if log_dir is None else log_dir / name
        self._file: LogFile | None = None
        self._lock = threading.Lock()
        self._phase, self._attempt, self._restarts = "starting", 0, 0
        self._workers: tuple[WorkerState, ...] = ()
        self._alive_until = time.monotonic() + ALIVE_S

    # --- the launcher's side ------------------------------------------------------------

    def note_alive(self, phase: str, seconds: float = ALIVE_S) -> None:
        """Notes that the launcher works.

        Args:
            phase: What it does: `starting`, `waiting for hosts`, `running`, `ended`.
            seconds: How long it may take until the next call.
        """
        with self._lock:
            self._phase, self._alive_until = phase, time.monotonic() + seconds

    def note_workers(self, workers: Sequence[WorkerState]) -> None:
        """Notes the state of the workers.

        Args:
            workers: The workers of this machine.
        """
        with self._lock:
            self._workers = tuple(workers)

    def note_start(self, workers: Iterable[WorkerState]) -> None:
        """Notes that workers were started, all at first or again.

        Args:
            workers: These workers.
        """
        self._attempt += 1
        started = [{"task": w.task, "pid": w.pid} for w in workers]
        self._write("start", attempt=self._attempt, workers=started)

    def note_failure(self, failure: Failure) -> None:
        """Notes the failure of a worker.

        Args:
            failure: The failure.
        """
        self._write(
            "failure",
            attempt=self._attempt,
            task=failure.worker.task,
            status=failure.status,
            what=failure.describe(),
            error=failure.last_error,
            where=failure.progress.where,
            blames_peer=failure.blames_peer,
        )

    def note_restart(self, cause: RestartCause, tasks: Sequence[str] = ()) -> None:
        """Notes that workers are started again.

        Args:
            cause: The cause.
            tasks: The workers; empty for all.
        """
        with self._lock:
            self._restarts += 1
        self._write(
            "restart",
            number=self._restarts,
            what=cause.what,
            where=cause.where,
            status=cause.status,
            tasks=list(tasks),
        )

    def note_end(self, status: int, what: str) -> None:
        """Notes the end of the run, and waits until the file is written.

        Args:
            status: The exit status of the launcher.
            what: The cause in a sentence; empty if all workers have succeeded.
        """
        self.note_alive("ended")
        self._write("end", status=status, what=what, restarts=self._restarts)
        if self._file is not None:
            self._file.close()
            self._file.wait()

    @contextlib.contextmanager
    def ended_by_errors(self) -> Iterator[None]:
        """Notes the end of the run if an error of tfdist ends it, while the context lasts."""
        try:
            yield
        except TfdistError as error:
            self.note_end(1, str(error))
            raise

    def _write(self, event: str, **fields: Any) -> None:
        if self._path is None:
            return
        if self._file is None:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = LogFile(self._path, is_appended=True, note=_lost)
            except OSError as error:
                print(
                    f"tfdist: warning: {str(self._path)!r} cannot be written "
                    f"({error.strerror}). Training goes on.",
                    file=sys.stderr,
                    flush=True,
                )
                self._path = None
                return
        line = {"time": time.time(), "event": event, "host": socket.gethostname()}
        line |= {"launcher": os.getpid(), **fields}
        self._file.write(f"{json.dumps(line)}\n".encode())

    # --- the side of who asks -------------------------------------------------------------

    @property
    def is_live(self) -> bool:
        """Whether the launcher looks after its workers."""
        return time.monotonic() < self._alive_until

    @property
    def is_ready(self) -> bool:
        """Whether all workers of this machine run, and training has made a step."""
        with self._lock:
            workers, phase = self._workers, self._phase
        return (
            phase == "running"
            and bool(workers)
            and all(worker.is_running for worker in workers)
            and all(worker.steps_made != 0 for worker in workers)
        )

    def report(self) -> dict[str, Any]:
        """Returns the health of the run, in types that JSON has."""
        live, ready = self.is_live, self.is_ready
        with self._lock:
            workers = {
                w.task: {"running": w.is_running, "epoch": w.epoch, "step": w.step}
                for w in self._workers
            }
            return {
                "live": live,
                "ready": ready,
                "phase": self._phase,
                "restarts": self._restarts,
                "workers": workers,
            }
