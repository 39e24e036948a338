"""The clusters of a test session: started once, ended with it, replaced where they break."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import QUIET, ROOT, tfdist_run

PLACES = (
    "single-1",
    "mirrored-2",
    "mirrored-4",
    "multi_worker-2",
    "horovod-2",
    "parameter_server-2",
    "multi_worker-3",
    "horovod-3",
    "mirrored-3",
    "parameter_server-3",
)
"""A strategy and its number of replicas, in the order in which they start."""

_CORES = 2  # that all places together keep busy
_TASK_S = 300.0
_START_S = 180.0


@dataclass(frozen=True)
class Outcome:
    """How a task went on one worker.

    Attributes:
        value: What it returned.
        error: The traceback, if it raised.
        seconds: How long it took.
    """

    value: Any = None
    error: str | None = None
    seconds: float = 0.0


def file_of(folder: Path, task: str, worker: int) -> Path:
    """Gives where a worker writes the outcome of a task."""
    return folder / f"{task.replace(' ', '.')}.worker-{worker}"


def on(place: str, *tasks: str) -> pytest.MarkDecorator:
    """Marks a test that needs the outcomes of tasks on a place.

    Args:
        place: One of `PLACES`.
        *tasks: Each a module with a function `do(argument, folder)`, a blank, and the argument.
    """
    assert place in PLACES, place
    return pytest.mark.place(place, tasks)


def wanted(items: Iterable[pytest.Item]) -> dict[str, list[str]]:
    """Gives what the marks of tests ask for: the tasks of each place, once, in their order."""
    found: dict[str, dict[str, None]] = {}
    for item in items:
        for mark in item.iter_markers("place"):
            place, tasks = mark.args
            found.setdefault(place, {}).update(dict.fromkeys(tasks))
    return {place: list(found[place]) for place in PLACES if place in found}


def workers_of(place: str) -> int:
    """Gives the number of processes of a place that do its tasks."""
    strategy, replicas = place.rsplit("-", 1)
    return int(replicas) if strategy in ("multi_worker", "horovod") else 1


class Clusters:
    """Does the tasks of all places in the background, a few processes at once.

    A cluster that ends early, or that is too long at a task, is replaced by another one for
    the tasks that are left; the task that it was at has failed.

    Args:
        tasks: Those of each place.
        folder: For what they write.
    """

    def __init__(self, tasks: dict[str, list[str]], folder: Path) -> None:
        self._folder = folder
        self._failed: dict[tuple[str, str], str] = {}
        self._over = threading.Event()
        self._idle = _CORES
        self._core = threading.Condition()
        for place in tasks:
            (folder / place).mkdir(parents=True)
        self._starter = threading.Thread(target=self._start, args=(tasks,), name="places")
        self._starter.start()

    def outcomes(self, place: str, task: str) -> list[Any]:
        """Waits for a task, and gives what each worker's function returned.

        Args:
            place: Where it was done.
            task: As in `on`.

        Raises:
            AssertionError: It failed on a worker; the message has the tracebacks.
        """
        found = [self._outcome(place, task, worker) for worker in range(workers_of(place))]
        errors = [
            f"worker {worker}: {outcome.error}"
            for worker, outcome in enumerate(found)
            if outcome.error is not None
        ]
        assert not errors, f"{task} on {place}:\n" + "\n".join(errors)
        return [outcome.value for outcome in found]

    def end(self) -> None:
        """Ends all that is left."""
        with self._core:
            self._over.set()
            self._core.notify_all()
        self._starter.join()

    def _outcome(self, place: str, task: str, worker: int) -> Outcome:
        file = file_of(self._folder / place, task, worker)
        while not file.exists():  # each task has a limit
            if (place, task) in self._failed:
                return Outcome(error=self._failed[place, task])
            time.sleep(0.02)
        outcome: Outcome = pickle.loads(file.read_bytes())
        return outcome

    def _start(self, tasks: dict[str, list[str]]) -> None:
        with ThreadPoolExecutor(_CORES) as pool:
            for place in tasks:
                cores = _cores(place)
                with self._core:
                    self._core.wait_for(lambda n=cores: self._idle >= n or self._over.is_set())
                    self._idle -= cores
                pool.submit(self._serve, place, tasks[place], cores)

    def _serve(self, place: str, tasks: Sequence[str], cores: int) -> None:
        left = list(tasks)
        for attempt in range(len(tasks)):
            if not left or self._over.is_set():
                break
            why = self._run(place, left, attempt)
            left = [task for task in left if not self._is_done(place, task)]
            if left:
                self._failed[place, left.pop(0)] = why
        with self._core:
            self._idle += cores
            self._core.notify_all()

    def _is_done(self, place: str, task: str) -> bool:
        workers = range(workers_of(place))
        return all(file_of(self._folder / place, task, w).exists() for w in workers)

    def _run(self, place: str, tasks: list[str], attempt: int) -> str:
        """Runs a cluster for some tasks, and gives why it ended."""
        folder = self._folder / place
        (folder / "tasks").write_text("\n".join(tasks))
        log = folder / f"log-{attempt}"
        with log.open("wb") as output:
            process = subprocess.Popen(
                _command(place, folder),
                cwd=ROOT,
                env={**QUIET, "COLUMNS": "100"},
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        try:
            state = self._follow(place, tasks, process)
        finally:
            _end(process)
        return f"the cluster {state}\n{log.read_text(errors='replace')[-3000:]}"

    def _follow(self, place: str, tasks: list[str], process: subprocess.Popen[bytes]) -> str:
        left, limit = list(tasks), time.monotonic() + _START_S + _TASK_S
        while process.poll() is None:
            while left and self._is_done(place, left[0]):
                left.pop(0)
                limit = time.monotonic() + _TASK_S
            if time.monotonic() > limit:
                return f"did not end it within {_TASK_S:.0f} s"
            if self._over.wait(0.05):
                return "was ended"
        return f"ended with status {process.returncode}"


def _cores(place: str) -> int:
    """Gives how many cores a place keeps busy."""
    servers = place.startswith("parameter_server")
    return min(2 if servers else workers_of(place), _CORES)


def _command(place: str, folder: Path) -> list[str]:
    strategy, replicas = place.rsplit("-", 1)
    command = ["-m", "tests.places.program", strategy, replicas, str(folder)]
    if strategy == "parameter_server":
        return tfdist_run(int(replicas), *command, options=["--ps", "2"])
    if workers_of(place) == 1:
        return [sys.executable, *command]
    return tfdist_run(workers_of(place), *command, options=["--strategy", strategy])


def _end(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, number)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                continue
