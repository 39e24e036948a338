"""One training of `benchmarks.chaos`: its launchers, what is seen of them, what they leave."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from benchmarks.chaos_hosts import ADDRESSES, Disk, Hosts

TRAINING = Path(__file__).with_name("chaos_training.py")
START = Path(__file__).with_name("chaos_start")
ROOT = Path(__file__).parents[1]
HANG_LIMIT_S = 10.0
_MARK = "CHAOS"
_WORKER = "tfdist.scripts.worker_main"


@dataclass(frozen=True)
class Place:
    """How a training is distributed.

    Attributes:
        options: Of `tfdist run`.
        arguments: Of the training.
        hosts: How many hosts; on two, each has one worker.
        devices: Whether each process gets two logical devices.
        tolerance: The largest relative distance from an undisturbed training; 0 for the same
            bits.
        like: The place whose undisturbed training it is compared with, if not its own.
        workers: How many processes drive the run: one alone may be paused.
    """

    options: tuple[str, ...]
    arguments: tuple[str, ...] = ()
    hosts: int = 1
    devices: bool = False
    tolerance: float = 0.0
    like: str = ""
    workers: int = 2


_MW, _HV = ("--strategy", "multi_worker"), ("--strategy", "horovod")
# With fewer workers, sums are added in another order.
_FEWER = 1e-5
PLACES = {
    "single": Place((), workers=1),
    "mirrored": Place((), devices=True, workers=1),
    "multi_worker": Place(("-n", "2", *_MW)),
    "horovod": Place(("-n", "2", *_HV)),
    "parameter_server": Place(("-n", "2", "--ps", "1"), ("--servers", "sync")),
    "parameter_server, asynchronous": Place(("-n", "2", "--ps", "1"), ("--servers", "async")),
    "multi_worker, elastic": Place(
        ("--elastic", "1:2", *_MW), tolerance=_FEWER, like="multi_worker"
    ),
    "horovod, elastic": Place(("--elastic", "1:2", *_HV), tolerance=_FEWER, like="horovod"),
    "multi_worker, two hosts": Place(_MW, hosts=2, like="multi_worker"),
    "horovod, two hosts": Place(_HV, hosts=2, like="horovod"),
}


@dataclass(frozen=True)
class Found:
    """A process of a training.

    Attributes:
        pid: Its number.
        parent: That of its parent.
        launch: The start of a launcher to which it belongs.
        started: When it started, in the kernel's clock.
        state: "T" if it is stopped.
        is_worker: Whether it runs the script, or serves.
        task: Its name.
    """

    pid: int
    parent: int
    launch: str
    started: str
    state: str
    is_worker: bool
    task: str


def processes(name: str) -> list[Found]:
    """Lists the processes of a training, whoever their parents are.

    Args:
        name: Of the training.
    """
    found = []
    for number in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError, IndexError, ValueError):
            folder = Path("/proc", number)
            content = (folder / "environ").read_bytes()
            if f"{_MARK}={name} ".encode() not in content:
                continue
            texts = content.decode(errors="replace").split("\0")
            environ = dict(t.split("=", 1) for t in texts if "=" in t)
            state, parent, *rest = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_bytes().decode(errors="replace")
            launch = environ[_MARK].split()[1]
            found.append(
                Found(
                    int(number),
                    int(parent),
                    launch,
                    rest[17],
                    state,
                    _WORKER in command,
                    task_of(environ),
                )
            )
    return found


def task_of(environ: Mapping[str, str]) -> str:
    """Returns the name of a worker, as the launcher calls it.

    Args:
        environ: Its environment.
    """
    if "HOROVOD_RANK" in environ:
        return f"worker {environ['HOROVOD_RANK']}"
    task = json.loads(environ.get("TF_CONFIG") or "{}").get("task")
    if not task:
        return "worker 0"
    return "chief" if task["type"] == "chief" else f"{task['type']} {task['index']}"


@dataclass
class Launcher:
    """A launcher of one host.

    Attributes:
        host: The number of the host.
        command: Its command.
        environ: Its environment.
        folder: Of the training.
        process: The process of its last start.
        starts: How often it was started.
        is_done: Whether it has ended with 0.
    """

    host: int
    command: list[str]
    environ: dict[str, str]
    folder: Path
    process: Any = None
    starts: int = 0
    is_done: bool = False
    lines: list[tuple[float, str]] = field(default_factory=list)

    @property
    def launch(self) -> str:
        """The name of its last start."""
        return f"{self.host}.{self.starts}"

    def start(self, name: str) -> None:
        """Starts it, for the first time or again."""
        self.starts += 1
        logs = self.folder / f"logs-{self.launch}"
        command = [part.replace("{logs}", str(logs)) for part in self.command]
        self.process = subprocess.Popen(
            command,
            env={**self.environ, _MARK: f"{name} {self.launch} "},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.say(f"# started: process {self.process.pid}")
        threading.Thread(target=self._read, args=(self.process,), daemon=True).start()

    def _read(self, process: Any) -> None:
        for raw in process.stdout:
            self.say(raw.decode(errors="replace").rstrip())

    def say(self, line: str) -> None:
        now = time.time()
        self.lines.append((now, line))
        with (self.folder / f"output-{self.host}").open("a") as file:
            file.write(f"{now:.2f} {line}\n")

    def events(self) -> list[dict[str, Any]]:
        """Reads the events of all its starts."""
        found = []
        for path in sorted(self.folder.glob(f"logs-{self.host}.*/events*.jsonl")):
            for line in path.read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # it is being written
                    found.append(json.loads(line))
        return found


class Training:
    """A training and all that is around it.

    Args:
        place: A key of `PLACES`.
        folder: For its files; must not exist.
        environ: Variables for its processes.
    """

    def __init__(self, place: str, folder: Path, environ: Mapping[str, str]) -> None:
        self.place, self.folder = PLACES[place], folder
        folder.mkdir(parents=True)
        self.name = f"{folder.name}-{os.getpid()}"
        self.hosts = Hosts(self.place.hosts, f"ch{os.getpid() % 10000}{folder.name[-3:]}")
        self.disk = Disk(folder / "disk")
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self.set_pace(0.0)
        digits = load_digits()
        images = (digits.images[..., None] / 16).astype("float32")
        np.savez(folder / "digits.npz", x=images, y=digits.target)
        self.shared_memory = set(os.listdir("/dev/shm"))
        variables = {
            **os.environ,
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "TF_NUM_INTRAOP_THREADS": "1",  # on one host and on two the same
            "TF_NUM_INTEROP_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "TFDIST_HANG_LIMIT": f"{HANG_LIMIT_S:g}",
            "TMPDIR": str(self.temporary),
            "TFDIST_TOKEN_FILE": str(folder / "token"),
            **environ,
        }
        variables["PYTHONPATH"] = f"{START}:{ROOT}"
        if self.place.devices:
            variables["CHAOS_DEVICES"] = "2"
        several = f"{ADDRESSES[0]}:1,{ADDRESSES[1]}:1"
        self.launchers = [
            Launcher(
                host,
                self.hosts.command(
                    host,
                    [
                        *(sys.executable, "-m", "tfdist.cli", "run", *self.place.options),
                        *(("--hosts", several) if self.place.hosts > 1 else ()),
                        *(("--node-rank", str(host)) if self.place.hosts > 1 else ()),
                        *("--max-restarts", "1000", "--log-dir", "{logs}"),
                        *(str(TRAINING), str(folder), str(self.checkpoints)),
                        *self.place.arguments,
                    ],
                ),
                variables,
                folder,
            )
            for host in range(self.place.hosts)
        ]

    @property
    def checkpoints(self) -> Path:
        return self.disk.folder / "checkpoints"

    def set_pace(self, seconds: float) -> None:
        """Sets the least duration of a step."""
        path = self.folder / "pace.new"
        path.write_text(str(seconds))
        path.rename(self.folder / "pace")

    def start(self) -> None:
        for launcher in self.launchers:
            launcher.start(self.name)

    def say(self, line: str) -> None:
        self.launchers[0].say(line)

    @property
    def is_done(self) -> bool:
        return all(launcher.is_done for launcher in self.launchers)

    def workers(self) -> list[Found]:
        """Lists the processes that launchers have started."""
        return [found for found in processes(self.name) if found.is_worker]

    def events(self) -> list[dict[str, Any]]:
        """Reads what the launchers have noticed, in the order of time."""
        found = [event for launcher in self.launchers for event in launcher.events()]
        return sorted(found, key=lambda event: event["time"])

    def steps(self) -> list[tuple[float, int, str]]:
        """Reads the time, number and process of each step of the chief."""
        path = self.folder / "steps-0"
        lines = path.read_text().splitlines() if path.exists() else []
        parts = [line.split() for line in lines]
        return [(float(p[0]), int(p[1]), p[2]) for p in parts if len(p) == 3]

    def printed(self) -> list[tuple[float, str]]:
        return sorted(line for launcher in self.launchers for line in launcher.lines)

    def finals(self) -> list[Path]:
        return sorted(self.folder.glob("final-*.npz"))

    def left(self, patience: float = 15.0) -> list[str]:
        """Says what is left of it, after waiting a little for what is about to go."""
        deadline = time.monotonic() + patience
        while (found := self._left()) and time.monotonic() < deadline:
            time.sleep(0.3)
        return found

    def _left(self) -> list[str]:
        checkpoints = os.listdir(self.checkpoints) if self.checkpoints.exists() else []
        known = ("epoch-", "damaged-")
        return [
            *(f"process {p.pid} {p.task} {p.state}" for p in processes(self.name)),
            *(f"port {port}" for port in self.hosts.open_ports()),
            *(f"temporary file {name}" for name in os.listdir(self.temporary)),
            *(f"in the checkpoints {n}" for n in checkpoints if not n.startswith(known)),
        ]

    def end(self) -> None:
        """Kills what is left, and removes disk and hosts."""
        for launcher in self.launchers:
            if launcher.process is not None and launcher.process.poll() is None:
                launcher.process.kill()
        for found in processes(self.name):
            with contextlib.suppress(OSError):
                os.kill(found.pid, signal.SIGKILL)
        for launcher in self.launchers:
            if launcher.process is not None:
                launcher.process.wait(20)
        self.hosts.close()
        self.disk.close()


def same_process(found: Found, now: Sequence[Found]) -> bool:
    """Returns whether a process is still there.

    Args:
        found: The process.
        now: Those of the training.
    """
    return any(p.pid == found.pid and p.started == found.started for p in now)
