"""Programs that run beside pytest, on as many processes as they need, shared by tests.

Starting TensorFlow takes seconds, so one job runs many cases and writes a file for each.
"""

from __future__ import annotations

import gc
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
QUIET = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"}
for _name in ("TF_CONFIG", "TFDIST_STRATEGY", "TFDIST_DROP_IN"):
    QUIET.pop(_name, None)


def tfdist_run(workers: int, *arguments: Any, options: Sequence[str] = ()) -> list[str]:
    """Gives the command that runs a module or script on several workers."""
    command = [sys.executable, "-m", "tfdist.cli", "run", "-n", str(workers), *options]
    return [*command, *map(str, arguments)]


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


def on_place(place: str, module: str, *arguments: Any) -> list[str]:
    """Gives the command that runs a test's program on a place, such as "mirrored-2".

    Args:
        place: The name of a strategy and the number of replicas.
        module: The program, which calls `begin(strategy, replicas)`.
        *arguments: Its own, after strategy and replicas.
    """
    strategy, replicas = place.rsplit("-", 1)
    command = ["-m", module, strategy, replicas, *map(str, arguments)]
    workers = workers_of(place)
    if strategy == "parameter_server":
        return tfdist_run(int(replicas), *command, options=["--ps", "2"])
    if workers == 1:
        return [sys.executable, *command]
    return tfdist_run(workers, *command, options=["--strategy", strategy])


def workers_of(place: str) -> int:
    """Gives the number of processes of a place that run the program."""
    strategy, replicas = place.rsplit("-", 1)
    return int(replicas) if strategy in ("multi_worker", "horovod") else 1


def begin(strategy: str, replicas: str, seed: int) -> Any:
    """Begins the session of a test's program, with as many devices as it needs."""
    import tensorflow as tf

    import tfdist

    gc.freeze()  # what TensorFlow made when imported: a seventh of the time would go through it

    if strategy == "mirrored":
        (cpu,) = tf.config.list_physical_devices("CPU")
        devices = [tf.config.LogicalDeviceConfiguration()] * int(replicas)
        tf.config.set_logical_device_configuration(cpu, devices)
    if strategy == "parameter_server":  # parts so small that most variables are split
        return tfdist.init(tfdist.ParameterServer(synchronous=True, min_part_bytes=256), seed)
    return tfdist.init(strategy, seed=seed)


def finished(
    command: Sequence[str], seconds: float, environ: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Runs a command to its end and gives its exit status and all that it printed.

    Args:
        command: The program and its arguments.
        seconds: How long it may run.
        environ: Variables besides `QUIET`.
    """
    done = subprocess.run(
        command,
        env={**QUIET, **(environ or {})},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


class Job:
    """A command run in a process group of its own, with what it prints kept in a file."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.command = command
        self.log = log
        self.started: float | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._over = threading.Event()
        self._unwanted = False

    def run(self) -> None:
        """Runs the command to its end, unless it was ended before it began."""
        if not self._unwanted:
            with self.log.open("wb") as output:
                self._process = subprocess.Popen(
                    self.command,
                    cwd=ROOT,
                    env=QUIET,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            self.started = time.monotonic()
            self._process.wait()
        self._over.set()

    def wait_for(self, file: Path, seconds: float) -> Any:
        """Reads a pickled result once the job has written it.

        Args:
            file: What the job writes.
            seconds: How long the job may run until then.
        """
        while not file.exists():
            late = self.started is not None and time.monotonic() > self.started + seconds
            if (self._over.is_set() and not file.exists()) or late:
                tail = self.log.read_text(errors="replace")[-3000:]
                state = "took too long" if late else "ended"
                raise AssertionError(f"no {file.name}: {self.command} {state}\n{tail}")
            time.sleep(0.1)
        return pickle.loads(file.read_bytes())

    def end(self) -> None:
        """Ends the process group, first kindly."""
        self._unwanted = True
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._process is not None and self._process.poll() is None:
                os.killpg(self._process.pid, number)
                self._over.wait(10)


@contextmanager
def running(jobs: Sequence[Job], at_once: int = 2) -> Iterator[None]:
    """Runs jobs in their order, some at once, while the context lasts."""
    with ThreadPoolExecutor(at_once) as pool:
        for job in jobs:
            pool.submit(job.run)
        try:
            yield
        finally:
            for job in reversed(jobs):
                job.end()


def write(result: Any, target: Path) -> None:
    """Writes a result so that a reader sees all of it or nothing."""
    part = target.with_name(f"{target.name}.part{os.getpid()}")
    part.write_bytes(pickle.dumps(result))
    part.replace(target)
