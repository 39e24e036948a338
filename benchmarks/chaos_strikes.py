"""What strikes a training of `benchmarks.chaos`, and when that is noticed."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.chaos_run import (
    HANG_LIMIT_S,
    Found,
    Launcher,
    Training,
    processes,
    same_process,
)

PACE_S = 2.0  # so that a training does not end before its faults have struck
_NOTICE_S = 90.0
_RECOVERY_S = 240.0
_ENDED_AFTER_S = 15.0
_TOLD = ("No space left", "has no room", "make room", "cannot be written")
_RESUMED_WITHOUT = "warning: the checkpoint"


@dataclass
class Struck:
    """A fault that struck.

    Attributes:
        kind: A key of `KINDS`.
        what: The process, file or network, in words.
        at: When, in seconds since 1970.
        phase: "start", if no step was made since the last start, or "training".
        noticed_s: Seconds until the launcher noticed; None if it has not, or need not.
        recovered_s: Seconds until a step further than any before, if nothing else struck
            meanwhile.
        must_notice: Whether the launcher has to notice it.
        cpu_wait: The share of the last 10 s in which something waited for a processor.
    """

    kind: str
    what: str = ""
    at: float = 0.0
    phase: str = "start"
    noticed_s: float | None = None
    recovered_s: float | None = None
    must_notice: bool = True
    cpu_wait: float = 0.0


def cpu_wait() -> float:
    """Returns the share of the last 10 s in which something waited for a processor."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        first = Path("/proc/pressure/cpu").read_text().split()[1]
        return float(first.partition("=")[2]) / 100
    return 0.0


@dataclass
class Injector:
    """Strikes a training at random times, as nobody inside it could.

    Attributes:
        training: The training.
        place: Its place.
        draw: Of kinds, times and processes.
        count: How many faults.
        faults: Those that struck.
        unexpected: Ends of launchers that no fault explains.
        left: What was left of a launcher that had ended.
    """

    training: Training
    place: str
    draw: random.Random
    count: int
    faults: list[Struck] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    _allowed: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def go(self, deadline: float) -> bool:
        """Trains to the end, under faults.

        Args:
            deadline: When to give up, by `time.monotonic()`.

        Returns:
            Whether the training ended well.
        """
        self._deadline = deadline
        self.training.set_pace(PACE_S)
        self.training.start()
        while not self.training.is_done and len(self.faults) < self.count:
            # Short gaps strike starts, long ones strike steps and savings.
            gap = self.draw.choice((self.draw.uniform(0, 5), self.draw.uniform(5, 20)))
            if not self._wait(gap, lambda: False):
                break
            self._strike()
        self.training.set_pace(0.0)
        self._wait(float("inf"), lambda: self.training.is_done)
        return self.training.is_done

    # --- the launchers meanwhile --------------------------------------------------------

    def _wait(self, seconds: float, until: Callable[[], bool]) -> bool:
        """Waits, and starts launchers again; returns False if the training is over."""
        end = time.monotonic() + seconds
        while time.monotonic() < min(end, self._deadline):
            for launcher in self.training.launchers:
                self._look_after(launcher)
            if until():
                return True
            if self.training.is_done:
                return False
            time.sleep(0.1)
        return time.monotonic() < self._deadline

    def _look_after(self, launcher: Launcher) -> None:
        status = None if launcher.is_done else launcher.process.poll()
        if status is None:
            return
        launcher.say(f"# ended with {status}")
        begun = time.monotonic()
        while left := [p for p in processes(self.training.name) if p.launch == launcher.launch]:
            if time.monotonic() - begun > _ENDED_AFTER_S:
                self.left += [f"process {p.pid} {p.task} {p.state}" for p in left]
                for found in left:
                    with contextlib.suppress(OSError):
                        os.kill(found.pid, signal.SIGKILL)
                break
            time.sleep(0.1)
        if status == 0:
            launcher.is_done = True
            return
        expected = self._allowed.pop(launcher.host, ())
        if status not in expected:
            after = self.faults[-1].what if self.faults else "no fault"
            last = [line for _, line in launcher.lines[-40:] if "rror: " in line][-1:]
            self.unexpected.append(f"{status} after {after}: {last}")
        launcher.start(self.training.name)

    # --- strikes ------------------------------------------------------------------------

    def _strike(self) -> None:
        kind = self.draw.choice([k for k, weight in KINDS.items() for _ in range(weight)])
        fault = Struck(kind, at=time.time(), cpu_wait=cpu_wait())
        fault.phase = self._phase()
        furthest = max((step for _, step, _ in self.training.steps()), default=0)
        is_noticed = KINDS_OF[kind](self, fault)
        if is_noticed is None:  # there was nothing to strike
            return
        self.faults.append(fault)
        self.training.say(f"# FAULT {kind}: {fault.what} ({fault.phase})")

        def notice() -> bool:
            if fault.noticed_s is None and (when := is_noticed()):
                fault.noticed_s = round(when - fault.at, 2)
                self.training.say(f"# noticed after {fault.noticed_s} s")
            return fault.noticed_s is not None or not fault.must_notice

        def recover() -> bool:
            later = [
                when
                for when, step, _ in self.training.steps()
                if when > fault.at and step > furthest
            ]
            if later and (fault.noticed_s is None or later[-1] > fault.at + fault.noticed_s):
                after = fault.at + (fault.noticed_s or 0)
                fault.recovered_s = round(min(t for t in later if t >= after) - fault.at, 2)
            return fault.recovered_s is not None

        self._wait(_NOTICE_S, notice)
        if self.draw.random() < 0.5:
            self._wait(_RECOVERY_S, lambda: notice() and recover())

    def _phase(self) -> str:
        steps, events = self.training.steps(), self.training.events()
        started = [e["time"] for e in events if e["event"] == "start"]
        return "training" if steps and started and steps[-1][0] > started[-1] else "start"

    def _worker(self) -> Found | None:
        workers = self.training.workers()
        return self.draw.choice(workers) if workers else None

    def _failure_of(self, found: Found, at: float) -> Callable[[], float | None]:
        """Returns a function that gives the time when the loss of a worker was noticed."""

        def look() -> float | None:
            for event in self.training.events():
                if event["time"] < at:
                    continue
                if event["event"] == "failure" and event["task"] == found.task:
                    return float(event["time"])
                if event["event"] in ("restart", "end") and not same_process(
                    found, processes(self.training.name)
                ):
                    return float(event["time"])
            return None

        return look

    def _signalled(self, fault: Struck, number: int) -> Callable[[], float | None] | None:
        found = self._worker()
        if found is None:
            return None
        fault.what = f"{signal.Signals(number).name} to {found.task}"
        if number == signal.SIGSTOP and self.training.place.workers == 1:
            return self.paused(fault)
        try:
            os.kill(found.pid, number)
        except ProcessLookupError:
            return None
        return self._failure_of(found, fault.at)

    def killed(self, fault: Struck) -> Any:
        return self._signalled(fault, signal.SIGKILL)

    def aborted(self, fault: Struck) -> Any:
        return self._signalled(fault, signal.SIGABRT)

    def segfault(self, fault: Struck) -> Any:
        return self._signalled(
            fault, self.draw.choice((signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE))
        )

    def stopped(self, fault: Struck) -> Any:
        return self._signalled(fault, signal.SIGSTOP)

    def terminated(self, fault: Struck) -> Any:
        return self._signalled(fault, signal.SIGTERM)

    def all_killed(self, fault: Struck) -> Any:
        workers = self.training.workers()
        for found in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(found.pid, signal.SIGKILL)
        fault.what = f"SIGKILL to all {len(workers)}"
        return self._failure_of(workers[0], fault.at) if workers else None

    def paused(self, fault: Struck) -> Any:
        found, seconds = self._worker(), self.draw.uniform(0.3, HANG_LIMIT_S / 2)
        if found is None:
            return None
        self._pause(found.pid, seconds)
        fault.kind, fault.what = "worker paused", f"{found.task} for {seconds:.1f} s"
        fault.must_notice = False
        return lambda: None

    def _pause(self, pid: int, seconds: float) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(seconds)
            os.kill(pid, signal.SIGCONT)

    def _running_launcher(self) -> Launcher | None:
        running = [la for la in self.training.launchers if la.process.poll() is None]
        return self.draw.choice(running) if running else None

    def launcher_killed(self, fault: Struck) -> Any:
        return self._launcher(fault, signal.SIGKILL, (-9,))

    def launcher_terminated(self, fault: Struck) -> Any:
        return self._launcher(fault, signal.SIGTERM, (75, 143))

    def _launcher(self, fault: Struck, number: int, statuses: tuple[int, ...]) -> Any:
        launcher = self._running_launcher()
        if launcher is None:
            return None
        launch = launcher.launch
        # The launchers of other hosts may see it go, and ask to be started again.
        for other in self.training.launchers:
            self._allowed[other.host] = statuses if other is launcher else (75,)
        launcher.process.send_signal(number)
        fault.what = f"{signal.Signals(number).name} to the launcher"
        while any(p.launch == launch for p in processes(self.training.name)):
            if time.time() - fault.at > _NOTICE_S:
                self.left.append(f"of a launcher that got {fault.what}")
                return lambda: None
            time.sleep(0.1)
        ended = time.time()
        return lambda: ended

    def launcher_paused(self, fault: Struck) -> Any:
        launcher, seconds = self._running_launcher(), self.draw.uniform(1, HANG_LIMIT_S + 2)
        if launcher is None:
            return None
        self._pause(launcher.process.pid, seconds)
        fault.what, fault.must_notice = f"the launcher for {seconds:.1f} s", False
        return lambda: None

    def checkpoint_damaged(self, fault: Struck) -> Any:
        folders = sorted(self.training.checkpoints.glob("epoch-*"))
        if len(folders) < 2:  # a training whose only checkpoint is damaged is rightly refused
            return None
        files = [path for path in folders[-1].iterdir() if path.is_file()]
        how = self.draw.choice(("flip", "cut", "empty", "remove", "remove all"))
        if not files:
            return None
        path = self.draw.choice(sorted(files))
        with contextlib.suppress(FileNotFoundError):
            damage(path, how, self.draw)
        done = self._signalled(fault, signal.SIGKILL)  # so that it is read
        fault.what = f"{how} {folders[-1].name}/{path.name}; {fault.what}"
        return done or (lambda: time.time())

    def disk_full(self, fault: Struck) -> Any:
        if not self.training.disk.is_real:
            return None
        seconds = self.draw.uniform(2, 12)
        self.training.disk.fill()
        self._wait(seconds, lambda: False)
        self.training.disk.empty()
        for launcher in self.training.launchers:
            self._allowed[launcher.host] = (1,)  # it says so, and asks to be started again
        fault.what, fault.must_notice = f"for {seconds:.1f} s", False
        return lambda: next(
            (
                when
                for when, line in self.training.printed()
                if when >= fault.at and any(text in line for text in _TOLD)
            ),
            None,
        )

    def network_cut(self, fault: Struck) -> Any:
        seconds = self.draw.choice((self.draw.uniform(1, 5), self.draw.uniform(15, 30)))
        if not self.training.hosts.cut():
            return None
        fault.what, fault.must_notice = f"for {seconds:.1f} s", seconds > 15
        before = fault.at

        def look() -> float | None:
            noted = ("failure", "restart")
            times = [e["time"] for e in self.training.events() if e["event"] in noted]
            told = [w for w, line in self.training.printed() if "sends nothing" in line]
            return next((t for t in sorted(times + told) if t >= before), None)

        self._wait(seconds, lambda: False)
        self.training.hosts.mend()
        return look


def damage(path: Path, how: str, draw: random.Random) -> None:
    """Damages a file of a checkpoint.

    Args:
        path: The file.
        how: "flip", "cut", "empty", "remove" or "remove all".
        draw: Of the bits.
    """
    size = path.stat().st_size
    if how == "remove all":
        shutil.rmtree(path.parent, ignore_errors=True)
    elif how == "remove":
        path.unlink()
    elif how == "flip" and size:
        content = bytearray(path.read_bytes())
        for _ in range(draw.randint(1, 8)):
            content[draw.randrange(size)] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
    else:
        os.truncate(path, draw.randrange(size) if how == "cut" and size else 0)


KINDS = {
    "worker killed": 3,
    "all workers killed": 1,
    "worker aborted": 2,
    "segmentation fault": 2,
    "worker stopped": 3,
    "worker paused": 1,
    "worker terminated": 2,
    "launcher killed": 2,
    "launcher terminated": 2,
    "launcher paused": 1,
    "checkpoint damaged": 3,
    "disk full": 2,
    "network cut": 5,
}
KINDS_OF: dict[str, Callable[[Injector, Struck], Any]] = {
    "worker killed": Injector.killed,
    "all workers killed": Injector.all_killed,
    "worker aborted": Injector.aborted,
    "segmentation fault": Injector.segfault,
    "worker stopped": Injector.stopped,
    "worker paused": Injector.paused,
    "worker terminated": Injector.terminated,
    "launcher killed": Injector.launcher_killed,
    "launcher terminated": Injector.launcher_terminated,
    "launcher paused": Injector.launcher_paused,
    "checkpoint damaged": Injector.checkpoint_damaged,
    "disk full": Injector.disk_full,
    "network cut": Injector.network_cut,
}
