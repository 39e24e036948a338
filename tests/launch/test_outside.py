"""What can go wrong around a launcher: readers that stall, full disks, warnings, restarts.

The command line is the real one. Its workers are small scripts without TensorFlow.
"""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import free_port, is_gone
from tfdist.cluster.heartbeat import WorkerProgress
from tfdist.errors import ClusterError, LaunchError
from tfdist.launch import (
    Failure,
    Restarts,
    Roster,
    Worker,
    background_writer,
    check_names,
    health,
    hosts,
    parse_hosts,
)
from tfdist.launch.background_writer import BackgroundWriter
from tfdist.launch.detached import RunName
from tfdist.launch.health import health_of
from tfdist.launch.journal import Journal, WorkerState
from tfdist.launch.output import LineSplitter
from tfdist.launch.restarts import RestartCause, RestartLimit

quick = pytest.mark.quick
LIMIT_S = 60
COMMAND = """
import sys
import tfdist.cli.run as module
from tfdist.cli import main
from tfdist.launch import background_writer, health
background_writer.STALLED_S, health.FILE_EVERY_S = 0.5, 0.2
module.script_command = lambda arguments, module=False: (sys.executable, *arguments)
main()
"""
PREFIXES = ("TF_", "SLURM_", "TFDIST_", "HOROVOD_", "OMP_", "CUDA_", "NO_COLOR")


def eventually(condition: Callable[[], Any], seconds: float = LIMIT_S) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


class Runs:
    """Starts `tfdist run` on scripts given as text, and leaves none behind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[str]] = []

    def start(self, script: str, *options: str, **settings: Any) -> subprocess.Popen[str]:
        path = self.folder / "script.py"
        path.write_text(textwrap.dedent(script))
        environ = {k: v for k, v in os.environ.items() if not k.startswith(PREFIXES)}
        settings = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **settings}
        launcher = subprocess.Popen(
            [sys.executable, "-c", COMMAND, "run", *options, str(path)],
            env=environ,
            cwd=self.folder,
            text=True,
            **settings,
        )
        self.started.append(launcher)
        return launcher

    def run(self, script: str, *options: str, **settings: Any) -> tuple[int, str]:
        launcher = self.start(script, *options, **settings)
        output, errors = launcher.communicate(timeout=LIMIT_S)
        return launcher.returncode, (output or "") + (errors or "")

    def exists(self, pattern: str, count: int = 1) -> bool:
        return len(list(self.folder.glob(pattern))) >= count


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    runs = Runs(tmp_path)
    yield runs
    for launcher in runs.started:
        if launcher.poll() is None:
            launcher.kill()
        launcher.communicate(timeout=LIMIT_S)


WORKER = """
import os, signal, subprocess, sys, time
from pathlib import Path
from tfdist.cluster import heartbeat
from tfdist.cluster.warning_signals import survive_warnings
from tfdist.scripts.worker_main import follow_launcher

follow_launcher()
survive_warnings()
heartbeat.share_with_launcher()
rank = int(os.environ["TFDIST_LOCAL_RANK"])

def mark(name):
    Path(f"{name}-{rank}-{os.getpid()}").touch()

def await_file(name):
    while not Path(name).exists():
        time.sleep(0.02)
"""


DETACHED = """
def detach(name, *options, shell="exec sleep 300"):
    # A daemon: another session, and a parent that ends at once.
    command = " ".join(["setsid", "sh", "-c", f"'echo $$ > {name}; {shell}'"])
    subprocess.run(["env", *options, "sh", "-c", f"{command} >/dev/null 2>&1 &"])
    while not (Path(name).exists() and Path(name).read_text()):
        time.sleep(0.02)
"""


def pid_in(path: Path) -> int:
    return int(path.read_text())


@pytest.mark.waits
@pytest.mark.cluster
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc")
class TestDetached:
    @pytest.mark.parametrize("last", ["", "os.kill(os.getpid(), signal.SIGKILL)"])
    def test_what_the_script_has_detached_ends_with_the_run(
        self, last: str, runs: Runs
    ) -> None:
        deaf = "trap : TERM; while :; do sleep 1; done"
        script = WORKER + DETACHED + f"detach('a')\ndetach('b', shell={deaf!r})\n" + last
        status, shown = runs.run(script)
        assert status == (128 + signal.SIGKILL if last else 0), shown
        for name in "ab":
            pid = pid_in(runs.folder / name)
            assert is_gone(pid)
            assert shown.count(f"process {pid} (") == 1

    def test_one_without_the_variable_is_left_alone(self, runs: Runs) -> None:
        script = WORKER + DETACHED + "detach('a', '-u', 'TFDIST_RUN')"
        status, shown = runs.run(script)
        pid = pid_in(runs.folder / "a")
        assert status == 0, shown
        assert not is_gone(pid)
        os.kill(pid, signal.SIGKILL)

    def test_a_restart_begins_without_those_of_the_attempt_before(self, runs: Runs) -> None:
        script = (
            WORKER
            + DETACHED
            + (
                "if Path('a').exists():\n"
                "    from tfdist.cluster import process_ids\n"
                "    pid = int(Path('a').read_text())\n"
                "    mark('there' if process_ids.started(pid) else 'gone')\n"
                "else:\n"
                "    detach('a')\n"
                "    os.kill(os.getpid(), signal.SIGKILL)\n"
            )
        )
        status, shown = runs.run(script, "--max-restarts", "1")
        assert status == 0, shown
        assert runs.exists("gone-*")

    def test_those_of_a_killed_launcher_end_when_the_next_one_starts(self, runs: Runs) -> None:
        script = WORKER + DETACHED + "detach('a')\nmark('ready')\ntime.sleep(300)"
        other = runs.start(script)
        eventually(lambda: runs.exists("ready-*"))
        pid = pid_in(runs.folder / "a")
        status, shown = runs.run(WORKER + "print('x')")
        assert status == 0, shown
        assert not is_gone(pid)  # its launcher lives
        other.kill()
        other.wait(LIMIT_S)
        status, shown = runs.run(WORKER + "print('x')")
        # Of launchers that start at the same time, as other tests' do, one ends it and says so.
        assert (status, is_gone(pid)) == (0, True), shown


@quick
@pytest.mark.parametrize("text", ["", "1/2/3", "x/1/k/s", "1/2/3/4/5", "9" * 30 + "/1/k/s"])
def test_a_name_of_a_run_that_tfdist_did_not_write(text: str) -> None:
    assert RunName.read(text) is None


@quick
def test_the_name_of_a_run_says_whether_its_launcher_has_ended() -> None:
    name = RunName.new()
    assert RunName.read(str(name)) == name
    assert RunName.new() != name
    assert not name.has_lost_its_launcher
    assert replace(name, started="1").has_lost_its_launcher  # the number is used again
    assert not replace(name, started="1", kernel="other").has_lost_its_launcher
    assert not replace(name, started="").has_lost_its_launcher


@pytest.mark.waits
@pytest.mark.cluster
class TestOutput:
    def test_a_reader_that_stalls_holds_up_neither_workers_nor_signals(
        self, runs: Runs
    ) -> None:
        script = WORKER + (
            "for i in range(60_000): print(f'line {i} ' + 'x' * 90)\n"
            "mark('through')\n"
            "time.sleep(300)\n"
        )
        launcher = runs.start(script)
        assert launcher.stdout is not None
        eventually(lambda: runs.exists("through-*"))  # 6 MB, and nobody has read
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(LIMIT_S) == 128 + signal.SIGTERM
        shown = launcher.stdout.read()
        assert shown.startswith("worker 0 │ line 0 ")

    def test_what_was_dropped_is_counted_where_it_is_missing(self, runs: Runs) -> None:
        script = WORKER + (
            "for i in range(60_000): print(f'line {i} ' + 'x' * 90)\n"
            "mark('through')\n"
            "await_file('read')\n"
            "print('after')\n"
        )
        launcher = runs.start(script)
        eventually(lambda: runs.exists("through-*"))
        (runs.folder / "read").touch()
        shown, _ = launcher.communicate(timeout=LIMIT_S)
        assert launcher.returncode == 0
        lines = shown.splitlines()
        dropped = [int(n) for n in re.findall(r"tfdist: (\d+) lines of output are left", shown)]
        shown_lines = sum("│ line " in line for line in lines)
        assert sum(dropped) + shown_lines + ("│ after" in shown) == 60_001
        assert dropped

    def test_a_full_log_disk_does_not_end_training(self, runs: Runs) -> None:
        limit = 20_000

        def full() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        script = WORKER + "for i in range(2000): print(f'line {i} ' + 'x' * 90)"
        status, shown = runs.run(script, "--log-dir", "logs", preexec_fn=full)
        assert status == 0, shown
        assert "worker 0 │ line 1999 " in shown
        assert re.search(r"warning: 'logs/worker-0.log' cannot be written \(File too", shown)
        assert 0 < (runs.folder / "logs" / "worker-0.log").stat().st_size <= limit

    def test_output_to_a_full_disk_does_not_end_training(self, runs: Runs) -> None:
        with Path("/dev/full").open("w") as full:
            status, said = runs.run(
                WORKER + "print('x'); mark('done')", stdout=full, stderr=subprocess.PIPE
            )
        assert status == 0
        assert runs.exists("done-*")
        assert said.count("output cannot be written (No space left on device)") == 1

    @pytest.mark.parametrize("closed", [(0, 1, 2), (1,)])
    def test_closed_standard_streams(self, closed: tuple[int, ...], runs: Runs) -> None:
        script = WORKER + (
            "print('x', flush=True)\n"
            "mark('empty' if sys.stdin.read() == '' else 'input')\n"
            "child = subprocess.Popen(['sleep', '300'])\n"
            "Path(f'child-{child.pid}').touch()\n"
            "time.sleep(300)\n"
        )
        launcher = runs.start(
            script, "-n", "2", preexec_fn=lambda: [os.close(number) for number in closed]
        )
        eventually(lambda: runs.exists("empty-*", 2) and runs.exists("child-*", 2))
        launcher.kill()  # the lifeline is whole
        children = [int(path.name[6:]) for path in runs.folder.glob("child-*")]
        eventually(lambda: all(map(is_gone, children)))

    def test_who_has_stopped_does_not_outlive_the_launcher(self, runs: Runs) -> None:
        script = WORKER + (
            "child = subprocess.Popen(['sleep', '300'])\n"
            "Path(f'pid-{child.pid}').touch()\n"
            "Path(f'pid-{os.getpid()}').touch()\n"
            "os.kill(os.getpid(), signal.SIGSTOP) if rank else time.sleep(300)\n"
        )
        launcher = runs.start(script, "-n", "2")
        eventually(lambda: runs.exists("pid-*", 4))
        time.sleep(0.2)
        launcher.kill()
        pids = [int(path.name[4:]) for path in runs.folder.glob("pid-*")]
        eventually(lambda: all(map(is_gone, pids)))


@pytest.mark.waits
@pytest.mark.cluster
class TestRuns:
    def test_each_start_has_its_ports_its_logs_and_its_events(self, runs: Runs) -> None:
        script = WORKER + (
            "starts = len(list(Path().glob(f'start-{rank}-*')))\n"
            "Path(f'start-{rank}-{os.getpid()}').write_text(os.environ['TF_CONFIG'])\n"
            "print('start', starts)\n"
            "heartbeat.here.record_steps(0, 1 + starts, 1)\n"
            "while len(list(Path().glob('start-*'))) < 2 * (starts + 1): time.sleep(0.02)\n"
            "time.sleep(0.3)\n"
            "if starts < 2 and rank: sys.exit('no luck')\n"
            "await_file('end')\n"
        )
        options = ["-n", "2", "--max-restarts", "2/1h", "--log-dir", "logs"]
        launcher = runs.start(script, *options, "--health", "health.json")
        eventually(lambda: runs.exists("start-*", 6))

        def report() -> Any:
            try:
                return json.loads((runs.folder / "health.json").read_text())
            except OSError:
                return {}

        eventually(lambda: report().get("ready"))
        assert report()["restarts"] == 2
        assert report()["workers"]["worker 1"] == {"running": True, "epoch": 1, "step": 3}
        (runs.folder / "end").touch()
        shown, _ = launcher.communicate(timeout=LIMIT_S)
        assert launcher.returncode == 0, shown
        assert "All are started again (2 of 2/1h)." in shown
        assert not runs.exists("health.json")

        configs = {path.read_text() for path in runs.folder.glob("start-1-*")}
        assert len(configs) == 3  # other ports each time
        logs = runs.folder / "logs"
        names = [
            f"worker-{i}{end}.log" for i in (0, 1) for end in (".attempt-1", ".attempt-2", "")
        ]
        assert sorted(p.name for p in logs.iterdir()) == sorted([*names, "events.jsonl"])
        kept = [(logs / name).read_text() for name in names[3:]]
        assert kept == [f"start {i}\n" + "no luck\n" * (i < 2) for i in range(3)]
        events = [json.loads(line) for line in (logs / "events.jsonl").read_text().splitlines()]
        own = [event for event in events if event.get("task") != "worker 0"]
        assert [event["event"] for event in own] == [
            "start", "failure", "restart", "start", "failure", "restart", "start", "end"
        ]  # fmt: skip
        assert own[0]["attempt"] == 1
        assert [worker["task"] for worker in own[0]["workers"]] == ["worker 0", "worker 1"]
        assert own[1]["what"] == "worker 1 ended with exit status 1."
        assert own[1]["where"] == "after step 1 of epoch 1"
        assert own[-1]["status"] == 0

    def test_a_warning_is_passed_on_and_ends_nothing(self, runs: Runs) -> None:
        script = WORKER + (
            "if rank: signal.signal(signal.SIGUSR1, lambda *_: mark('warned'))\n"
            "mark('ready')\n"
            "await_file('end')\n"
        )
        launcher = runs.start(script, "-n", "2")
        eventually(lambda: runs.exists("ready-*", 2))
        launcher.send_signal(signal.SIGUSR1)
        launcher.send_signal(signal.SIGUSR2)
        eventually(lambda: runs.exists("warned-1-*"))
        (runs.folder / "end").touch()
        shown, _ = launcher.communicate(timeout=LIMIT_S)
        assert launcher.returncode == 0, shown
        assert "tfdist: SIGUSR1: workers in a `fit` with checkpoints save now." in shown

    def test_a_warning_that_ends_the_run_asks_to_be_started_again(self, runs: Runs) -> None:
        script = WORKER + (
            "def leave(*_):\n"
            "    heartbeat.here.set_flags(saves=True, preempted=True)\n"
            "    sys.exit(75)\n"
            "signal.signal(signal.SIGTERM, leave)\n"
            "heartbeat.here.set_flags(saves=True)\n"
            "print(os.environ['TFDIST_ON_WARNING'], flush=True)\n"
            "mark('ready')\n"
            "time.sleep(300)\n"
        )
        options = ["--on-warning", "end", "--on-preempt-status", "99", "--max-restarts", "3"]
        launcher = runs.start(script, *options, "--log-dir", "logs")
        eventually(lambda: runs.exists("ready-*"))
        launcher.send_signal(signal.SIGUSR2)
        shown, _ = launcher.communicate(timeout=LIMIT_S)
        assert launcher.returncode == 99, shown
        assert "worker 0 │ end" in shown
        last = (runs.folder / "logs" / "events.jsonl").read_text().splitlines()[-1]
        assert json.loads(last)["status"] == 99
        assert json.loads(last)["what"] == "The launcher got SIGUSR2."

    def test_a_reader_that_a_signal_ends_too_does_not_end_the_saving(self, runs: Runs) -> None:
        script = WORKER + (
            "def leave(*_):\n"
            "    for i in range(20): print('saving', flush=True); time.sleep(0.05)\n"
            "    heartbeat.here.set_flags(saves=True, preempted=True)\n"
            "    mark('saved')\n"
            "    sys.exit(75)\n"
            "signal.signal(signal.SIGTERM, leave)\n"
            "heartbeat.here.set_flags(saves=True)\n"
            "mark('ready')\n"
            "time.sleep(300)\n"
        )
        launcher = runs.start(script)
        eventually(lambda: runs.exists("ready-*"))
        launcher.send_signal(signal.SIGTERM)
        assert launcher.stdout is not None
        launcher.stdout.close()  # as of `| tee`
        assert launcher.wait(LIMIT_S) == 75
        assert runs.exists("saved-*")


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        try:
            os.close(end)
        except OSError:
            continue


def note(count: int) -> str:
    return f"[{count}]"


def drained(fd: int) -> bytes:
    """Reads until nothing comes for a moment."""
    content = b""
    while select.select([fd], [], [], 0.3)[0] and (data := os.read(fd, 1 << 16)):
        content += data
    return content


@quick
class TestBackgroundWriter:
    def test_what_fits_is_written_and_what_does_not_is_counted(
        self, pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reading, writing = pipe
        monkeypatch.setattr(background_writer, "_ROOM", 2000)
        writer = BackgroundWriter(writing, note, stalled_s=0.2)
        line = b"x" * 999 + b"\n"
        for _ in range(70):  # the pipe takes 64 KiB
            writer.write(line)
        eventually(lambda: writer.is_stalled)
        assert not writer.is_full  # nobody has to wait for a reader that reads nothing
        for _ in range(50):
            writer.write(line)
        content = drained(reading)
        eventually(lambda: not writer.is_stalled)
        writer.write(b"last\n")
        assert writer.wait()
        content += drained(reading)
        assert re.fullmatch(rb"(?:x{999}\n|\[\d+\]\n)+last\n", content)
        dropped = [int(number) for number in re.findall(rb"\[(\d+)\]", content)]
        assert dropped
        assert content.count(b"x\n") + sum(dropped) == 120

    def test_a_slow_reader_is_waited_for(
        self, pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reading, writing = pipe
        monkeypatch.setattr(background_writer, "_ROOM", 2000)
        writer = BackgroundWriter(writing, note)
        writer.write(b"x" * 80_000 + b"\n")
        eventually(lambda: writer.is_full)
        assert len(drained(reading)) == 80_001
        eventually(lambda: not writer.is_full)
        assert writer.wait()

    def test_an_end_that_nobody_reads_is_given_up(self, pipe: tuple[int, int]) -> None:
        _, writing = pipe
        writer = BackgroundWriter(writing, note, stalled_s=0.2)
        writer.write(b"x" * 80_000)
        assert not writer.wait()
        os.close(pipe[0])  # ends the thread

    def test_a_reader_that_is_gone(self, pipe: tuple[int, int]) -> None:
        reading, writing = pipe
        os.close(reading)
        writer = BackgroundWriter(writing, note)
        writer.write(b"x\n")
        eventually(lambda: writer.is_broken)
        writer.write(b"y\n")
        assert writer.wait()

    def test_a_pipe_that_does_not_block(self, pipe: tuple[int, int]) -> None:
        reading, writing = pipe
        os.set_blocking(writing, False)
        writer = BackgroundWriter(writing, note)
        writer.write(b"x" * 200_000)
        assert len(drained(reading)) == 200_000
        assert writer.wait()

    def test_a_disk_that_is_full_for_a_while(self, tmp_path: Path) -> None:
        errors: list[OSError] = []
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        with (tmp_path / "file").open("wb") as file:
            writer = BackgroundWriter(file.fileno(), note, errors.append)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
            for _ in range(5):
                writer.write(b"x" * 399 + b"\n")
            eventually(lambda: not writer._size)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        writer.write(b"last\n")
        assert writer.wait()
        assert [error.errno for error in errors] == [errno.EFBIG]
        content = (tmp_path / "file").read_bytes()
        assert content == (b"x" * 399 + b"\n") * 2 + b"x" * 200 + b"\n[3]\nlast\n"


@quick
def test_a_line_without_end_comes_in_pieces() -> None:
    lines = LineSplitter()
    found = []
    for _ in range(64):
        found += lines.feed(b"x" * 65_536)
        assert len(lines.unfinished) <= 1 << 14
    found += [*lines.feed(b"\n" + b"y" * 40_000 + b"\rnew\nz"), *lines.finish()]
    assert max(map(len, found)) == 1 << 14
    assert "".join(found[:-2]).count("x") == 64 * 65_536
    assert found[-2:] == ["new", "z"]


@quick
class TestRestarts:
    def cause(
        self, ended: float, returncode: int = 1, step: int = 0, **more: Any
    ) -> RestartCause:
        progress = WorkerProgress(steps_made=step, step=step)
        failure = Failure(Worker(0, (), {}), returncode, (), progress, ended, **more)
        return RestartCause.of(failure)

    def test_a_time_in_which_they_count(self) -> None:
        restarts = Restarts(RestartLimit.parse("2/10m"))
        for ended, step in [(0.0, 1), (300.0, 2)]:
            assert restarts.allows(self.cause(ended, step=step))
            restarts.record(self.cause(ended, step=step), "")
        assert not restarts.allows(self.cause(599.0, step=3))
        assert restarts.allows(self.cause(601.0, step=3))
        said = restarts.record(self.cause(601.0, step=3), "Again")
        assert said.endswith("Again (2 of 2/10m).")

    @pytest.mark.parametrize(
        ("text", "limit"),
        [
            ("0", (0, float("inf"))),
            ("3", (3, float("inf"))),
            ("3/90s", (3, 90)),
            ("1/2d", (1, 172800)),
        ],
    )
    def test_limits(self, text: str, limit: tuple[int, float]) -> None:
        parsed = RestartLimit.parse(text)
        assert (parsed.count, parsed.seconds) == limit
        assert str(parsed) == text

    @pytest.mark.parametrize(
        "text", ["", "-1", "x", "3/", "3/10", "3/0s", "/10m", "3/10m/1s", "1.5"]
    )
    def test_malformed_limits(self, text: str) -> None:
        with pytest.raises(LaunchError, match="`--max-restarts` must be a number"):
            RestartLimit.parse(text)

    @pytest.mark.parametrize(
        ("returncode", "memory_ran_out", "step", "repeats"),
        [
            (-9, False, 0, False),  # preemption, twice in start-up
            (-9, False, 5, False),
            (-9, True, 5, True),
            (-9, None, 0, False),
            (-9, None, 5, True),
            (-15, None, 0, False),
            (-11, False, 0, True),
            (1, False, 0, True),
        ],
    )
    def test_what_comes_from_outside_may_come_twice(
        self, returncode: int, memory_ran_out: bool | None, step: int, repeats: bool
    ) -> None:
        restarts = Restarts(9)
        cause = self.cause(0.0, returncode, step, memory_ran_out=memory_ran_out)
        restarts.record(cause, "")
        assert restarts.repeats(cause) is repeats
        assert restarts.allows(cause) is not repeats


@quick
def test_a_name_that_resolves_late_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[str] = []

    def look_up(name: str, port: None) -> list[int]:
        calls.append(name)
        if name == "late" and calls.count("late") < 4:
            raise socket.gaierror
        return [1]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(hosts, "_POLL_S", 0.01)
    check_names(parse_hosts("here,late"))
    assert calls.count("late") == 4
    assert capsys.readouterr().err.count("no name service knows late yet") == 1
    monkeypatch.setenv("TFDIST_START_TIMEOUT", "0")
    calls.clear()
    with pytest.raises(ClusterError, match="late, which no name service knows after 0 s"):
        check_names(parse_hosts("late"))


@quick
def test_each_start_gets_other_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TF_CONFIG", raising=False)
    options = {"hosts": (), "node_rank": None}
    alike = Roster(["x"], workers=2, elastic=None, **options)
    configs = [alike.workers[0], alike.again()[0]]
    elastic = Roster(["x"], workers=None, elastic=(1, 2), **options)
    assert elastic.slots is not None
    configs += [elastic.slots.workers[0]]
    elastic.slots.plan_next_start(Failure(elastic.slots.workers[0], 1, ()))
    configs += [elastic.slots.workers[0]]
    assert len({worker.environment["TF_CONFIG"] for worker in configs}) == 4


class TestHealth:
    pytestmark = quick

    def asked(self, port: int, path: str) -> tuple[int, Any]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def test_probes_by_http(self) -> None:
        journal, port = Journal(), free_port()
        worker = WorkerState("worker 0", 1, True, 0, 0, 0)
        with health_of(journal, f"127.0.0.1:{port}"):
            with socket.create_connection(("127.0.0.1", port)):  # one that says nothing
                assert self.asked(port, "/livez")[0] == 200
            assert self.asked(port, "/readyz")[0] == 503
            journal.note_alive("running")
            journal.note_workers([worker])
            assert self.asked(port, "/readyz")[0] == 503  # no step is made yet
            journal.note_workers([WorkerState("worker 0", 1, True, 7, 2, 3)])
            status, report = self.asked(port, "/readyz")
            assert (status, report["live"], report["ready"]) == (200, True, True)
            assert report["workers"] == {"worker 0": {"running": True, "epoch": 2, "step": 3}}
            assert self.asked(port, "/other")[0] == 404
            journal.note_alive("running", -1.0)
            assert self.asked(port, "/healthz")[0] == 503
            with pytest.raises(LaunchError, match="`--health` must be a free port"):
                health_of(journal, f"127.0.0.1:{port}").__enter__()

    def test_many_callers_do_not_keep_others_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(health, "_MOST_CALLERS", 4)
        port = free_port()
        with health_of(Journal(), f"127.0.0.1:{port}"):
            silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
            assert self.asked(port, "/livez")[0] == 200
            for caller in silent:
                caller.close()

    def test_a_file_gets_old_when_the_launcher_hangs(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(health, "FILE_EVERY_S", 0.02)
        journal, path = Journal(), tmp_path / "health.json"
        with health_of(journal, str(path)):
            written = path.stat().st_mtime_ns
            eventually(lambda: path.stat().st_mtime_ns != written)
            journal.note_alive("running", -1.0)
            time.sleep(0.1)
            written = path.stat().st_mtime_ns
            time.sleep(0.1)
            assert path.stat().st_mtime_ns == written
        assert list(tmp_path.iterdir()) == []
        assert not [t for t in threading.enumerate() if t.name == "tfdist-health"]

    @pytest.mark.parametrize("where", ["0", "70000", "a b:80", "/none/there/health.json"])
    def test_wrong_places(self, where: str) -> None:
        with pytest.raises(LaunchError, match="`--health` must be"):
            health_of(Journal(), where).__enter__()
