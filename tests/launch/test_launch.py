"""The launcher, mostly on real worker processes: small scripts that need no TensorFlow."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import termios
import textwrap
import time
import tracemalloc
from pathlib import Path

import pytest

from tests.jobs import free_port, is_gone
from tfdist.errors import ClusterError, LaunchError
from tfdist.launch import Failure, Host, Worker, parse_hosts, plan_workers
from tfdist.launch.cause import root_cause
from tfdist.launch.hidden_output import HiddenOutput, leader
from tfdist.launch.hosts import worker_addresses
from tfdist.launch.output import LineSplitter, Screen, settled
from tfdist.launch.plan import free_addresses
from tfdist.launch.resources import gpu_environments, usable_cores, visible_gpus

quick = pytest.mark.quick
cluster = pytest.mark.cluster
waits = pytest.mark.waits
LIMIT_S = 60

# The launcher as a process of its own, without the bootstrap and so without TensorFlow.
LAUNCHER = """
import json, os, sys
from pathlib import Path
from contextlib import nullcontext
from tfdist.launch import Restarts, Roster, connect_launchers
from tfdist.launch import parse_hosts, restart_lines, run_workers
options = json.loads(sys.argv[1])
log_dir = options.pop("log_dir", None)
options["hosts"] = hosts = parse_hosts(options["hosts"]) if "hosts" in options else ()
shows = options.pop("shows", "all")
most, limit = options.pop("max_restarts", 0), options.pop("limit", 60)
least, total = options.pop("least", None), options.pop("workers", None)
roster = Roster(
    (sys.executable, *sys.argv[2:]),
    **{"node_rank": None, **options},
    workers=total if least is None else None,
    elastic=None if least is None else (least, total or sum(host.slots for host in hosts)),
)
together = nullcontext()
if most and options["hosts"]:
    together = connect_launchers(
        options["hosts"],
        options["node_rank"],
        options["port"],
        os.environ.get("TFDIST_TOKEN", "a token"),
        max_restarts=most,
        limit=limit,
        min_workers=least,
    )

with together as client:
    outcome = run_workers(
        roster.workers,
        log_dir=Path(log_dir) if log_dir else None,
        restarts=Restarts(most),
        client=client,
        slots=roster.slots,
        plan=roster.of_hosts if least else None,
        shows=shows,
    )
for line in restart_lines(outcome.restarts):
    print(line)
if outcome.elsewhere:
    print("ELSEWHERE", outcome.elsewhere.what)
if outcome.is_repeated:
    print("REPEATED")
if outcome.failure:
    print("CAUSE", outcome.failure.describe(), *outcome.failure.excerpt(), sep="\\n")
    print("FINISHED", *outcome.finished)
sys.exit(outcome.status)
"""


@pytest.fixture
def environ() -> dict[str, str]:
    ours = ("TF_", "SLURM_", "TFDIST_", "HOROVOD_", "OMP_", "CUDA_", "NO_COLOR")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


class Scripts:
    """Starts launchers on scripts given as text, and leaves none behind."""

    def __init__(self, folder: Path, environ: dict[str, str]) -> None:
        self.folder = folder
        self.environ = environ
        self.started: list[subprocess.Popen] = []

    def start(self, script: str, *arguments: str, stdout=subprocess.PIPE, **options):
        path = self.folder / "script.py"
        path.write_text(textwrap.dedent(script))
        launcher = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, json.dumps(options), str(path), *arguments],
            env=self.environ,
            cwd=self.folder,
            stdout=stdout,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.started.append(launcher)
        return launcher

    def run(self, script: str, *arguments: str, **options) -> tuple[int, str]:
        launcher = self.start(script, *arguments, **options)
        output, _ = launcher.communicate(timeout=LIMIT_S)
        return launcher.returncode, output

    def pids(self, count: int) -> list[int]:
        """Waits until that many processes have left their number, and returns them all."""

        def written() -> list[int]:
            texts = [path.read_text() for path in self.folder.glob("pid-*")]
            return [int(text) for text in texts if text.endswith("\n")]

        eventually(lambda: len(written()) >= count)
        return written()


@pytest.fixture
def scripts(tmp_path, environ):
    scripts = Scripts(tmp_path, environ)
    yield scripts
    for launcher in scripts.started:
        if launcher.poll() is None:
            launcher.kill()
    for launcher in scripts.started:
        output, _ = launcher.communicate(timeout=LIMIT_S)
        print(output)  # pytest shows it where a test failed


def eventually(condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def given(cluster: dict[str, list[str]], type_: str, index: int) -> str:
    return json.dumps({"cluster": cluster, "task": {"type": type_, "index": index}})


RANK = "import os, sys, time; rank = int(os.environ['TFDIST_LOCAL_RANK'])\n"

# Each worker and a child of each leave their numbers, and then stay.
STAY = """
import os, signal, subprocess, sys, time
from pathlib import Path
from tfdist.scripts.worker_main import follow_launcher

def leave(pid):
    Path(f"pid-{pid}").write_text(f"{pid}\\n")

follow_launcher()
if "deaf" in sys.argv:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
leave(child.pid)
leave(os.getpid())
if "leave" in sys.argv:
    # Not before the others: a failure ends those that are still starting.
    while len(list(Path().glob("pid-*"))) < 4:
        time.sleep(0.02)
    sys.exit(int(sys.argv[2]))
time.sleep(300)
"""


@waits
@cluster
class TestEnds:
    def test_success(self, scripts):
        status, output = scripts.run(RANK + "print('hello', rank)", workers=3)
        assert status == 0
        assert sorted(output.splitlines()) == [f"worker {i} │ hello {i}" for i in range(3)]

    def test_a_worker_may_finish_before_the_others(self, scripts):
        script = RANK + "time.sleep(rank); print('end', rank)"
        assert scripts.run(script, workers=2)[1].splitlines()[-1] == "worker 1 │ end 1"

    def test_first_failure_ends_all_and_is_repeated(self, scripts):
        script = RANK + (
            "if rank == 1:\n"
            "    print('before'); raise ValueError('my mistake')\n"
            "time.sleep(300)"
        )
        before = time.monotonic()
        status, output = scripts.run(script, workers=3)
        assert time.monotonic() - before < 10
        assert status == 1
        cause = output.partition("CAUSE\n")[2].splitlines()
        assert cause[0] == "worker 1 ended with exit status 1."
        assert cause[1] == "Traceback (most recent call last):"
        assert cause[-2] == "ValueError: my mistake"
        assert "before" not in cause

    @pytest.mark.parametrize(
        ("end", "status"),
        [
            ("sys.exit(7)", 7),
            ("os.kill(os.getpid(), 9)", 137),
            ("os.kill(os.getpid(), 15)", 143),
            ("os.abort()", 134),
        ],
    )
    def test_status(self, scripts, end, status):
        script = RANK + f"if rank == 0: {end}\ntime.sleep(300)"
        assert scripts.run(script, workers=2)[0] == status

    def test_cause_is_not_the_worker_that_lost_its_peer(self, scripts):
        script = RANK + (
            "class UnavailableError(Exception): pass\n"
            "if rank == 0: raise UnavailableError('Socket closed')\n"
            "time.sleep(0.3)\n"
            "if rank == 1: sys.exit('the data is missing')\n"
            "time.sleep(300)"
        )
        _, output = scripts.run(script, workers=3)
        assert "CAUSE\nworker 1 ended with exit status 1.\nthe data is missing\n" in output

    def test_says_who_had_finished(self, scripts):
        script = RANK + (
            "if rank == 1: sys.exit(0)\n"
            "time.sleep(1)\n"
            "sys.exit('UNAVAILABLE: Connection reset by peer')"
        )
        status, output = scripts.run(script, workers=2)
        assert status == 1
        assert output.endswith("FINISHED worker 1\n")

    def test_program_that_is_not_there(self, scripts, monkeypatch):
        launcher = LAUNCHER.replace("(sys.executable, *", "('/not/there', *")
        monkeypatch.setattr(sys.modules[__name__], "LAUNCHER", launcher)
        status, output = scripts.run("", workers=2)
        assert status == 1
        assert "LaunchError: The program of worker 0 must be one that can be started" in output


@waits
@cluster
class TestNothingIsLeft:
    @pytest.mark.parametrize(
        ("number", "status"),
        [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
    )
    def test_signal(self, scripts, number, status):
        launcher = scripts.start(STAY, workers=2)
        pids = scripts.pids(4)
        launcher.send_signal(number)
        assert launcher.wait(10) == status
        eventually(lambda: all(map(is_gone, pids)))

    def test_worker_that_ignores_signals(self, scripts):
        launcher = scripts.start(STAY, "deaf", workers=2)
        pids = scripts.pids(4)
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(15) == 143
        eventually(lambda: all(map(is_gone, pids)))

    def test_second_interrupt_kills_at_once(self, scripts):
        launcher = scripts.start(STAY, "deaf", workers=2)
        pids = scripts.pids(4)
        launcher.send_signal(signal.SIGINT)
        time.sleep(0.5)
        launcher.send_signal(signal.SIGINT)
        assert launcher.wait(6) == 130  # without the second one it would take 8 s
        eventually(lambda: all(map(is_gone, pids)))

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGQUIT])
    def test_launcher_is_killed(self, scripts, number):
        launcher = scripts.start(STAY, "deaf", workers=2)
        pids = scripts.pids(4)
        launcher.send_signal(number)
        launcher.wait(10)
        eventually(lambda: all(map(is_gone, pids)))

    @pytest.mark.parametrize("status", ["0", "3"])
    def test_children_of_a_worker_that_ended(self, scripts, status):
        launcher = scripts.start(STAY, "leave", status, workers=2)
        pids = scripts.pids(4)
        assert launcher.wait(15) == int(status)
        eventually(lambda: all(map(is_gone, pids)))

    def test_a_worker_that_is_stopped_when_the_others_have_ended(self, scripts):
        scripts.environ["TFDIST_HANG_LIMIT"] = "1"
        script = RANK + "import signal; os.kill(os.getpid(), signal.SIGSTOP) if rank else 0"
        status, output = scripts.run(script, workers=2)
        assert status == 128 + signal.SIGKILL
        assert "worker 1 has been stopped (SIGSTOP) for " in output

    def test_reader_of_the_output_is_gone(self, scripts):
        launcher = scripts.start(
            STAY.replace("time.sleep(300)\n", "while True: print('x' * 999)")
        )
        pids = scripts.pids(2)
        launcher.stdout.close()
        assert launcher.wait(15) == 141
        eventually(lambda: all(map(is_gone, pids)))


@waits
@cluster
class TestOutput:
    def test_lines_of_workers_do_not_mix(self, scripts):
        script = RANK + (
            "for i in range(500):\n"
            "    for part in (str(rank) * 40, '-', str(rank) * 40, '\\n'):\n"
            "        sys.stdout.write(part)"
        )
        status, output = scripts.run(script, workers=3)
        assert status == 0
        expected = [f"worker {i} │ {str(i) * 40}-{str(i) * 40}" for i in range(3)]
        lines = output.splitlines()
        assert len(lines) == 1500
        assert set(lines) == set(expected)

    def test_only_the_chief_is_shown(self, scripts):
        script = RANK + (
            "print('mine', rank)\n"
            "if rank: print('tfdist: a report\\n  its second line'); time.sleep(0.5)"
        )
        status, output = scripts.run(script, workers=3, shows="chief")
        assert status == 0
        assert sorted(output.splitlines()) == sorted(
            [
                "worker 0 │ mine 0",
                *[f"worker {i} │ tfdist: a report" for i in (1, 2)],
                *[f"worker {i} │   its second line" for i in (1, 2)],
                *[line for line in output.splitlines() if "--output all shows all" in line],
            ]
        )
        assert output.count("--output all shows all") == 1

    def test_one_reason_is_shown_once(self, scripts):
        script = RANK + (
            "class UnavailableError(Exception): pass\n"
            "time.sleep(0.2 * rank)\n"
            "raise UnavailableError('Socket closed')"
        )
        _, output = scripts.run(script, workers=2, shows="chief")
        shown = output.partition("CAUSE")[0]
        assert shown.count("Traceback") == 1
        assert "worker 1 │ tfdist: it failed as worker 0 did. " in shown

    def test_hidden_workers_show_one_reason_once_too(self, scripts):
        script = RANK + (
            "if not rank: time.sleep(300)\n"
            "time.sleep(0.2 * rank)\n"
            "print('before', rank, flush=True)\n"
            "raise ConnectionError('Socket closed')"
        )
        _, output = scripts.run(script, workers=3, shows="chief")
        shown = output.partition("CAUSE")[0]
        assert shown.count("Traceback") == 1
        assert "worker 1 │ before 1" in shown
        told = "tfdist: it failed as worker 1 did. ConnectionError: Socket closed"
        assert f"worker 2 │ {told}" in shown

    def test_only_failed_workers_are_shown(self, scripts):
        script = RANK + (
            "print('mine', rank, flush=True)\n"
            "print('tfdist: told', rank, flush=True)\n"
            "if rank == 1: time.sleep(0.3); raise ValueError('my mistake')\n"
            "time.sleep(300)"
        )
        status, output = scripts.run(script, workers=2, shows="failed")
        assert status == 1
        shown = output.partition("CAUSE")[0]
        assert "mine 0" not in shown
        assert "worker 1 │ mine 1\nworker 1 │ Traceback" in shown
        assert "worker 0 │ tfdist: told 0" in shown
        hiding = "tfdist: only the output of a worker that fails is shown. --output all"
        assert shown.count(hiding) == 1

    def test_whoever_fails_is_shown_too(self, scripts):
        script = RANK + (
            "print('mine', rank)\n"
            "class UnavailableError(Exception): pass\n"
            "if rank == 1: raise UnavailableError('Socket closed')\n"
            "time.sleep(0.3)\n"
            "if rank == 2: raise ValueError('my mistake')\n"
            "time.sleep(300)"
        )
        status, output = scripts.run(script, workers=4, shows="chief")
        assert status == 1
        shown = output.partition("CAUSE")[0]
        assert "worker 2 │ mine 2\nworker 2 │ Traceback (most recent call last):" in shown
        assert "worker 2 │ ValueError: my mistake" in shown
        lost = "UnavailableError: Socket closed"
        assert f"worker 1 │ tfdist: it lost another worker. __main__.{lost}" in shown or (
            f"worker 1 │ tfdist: it lost another worker. {lost}" in shown
        )
        assert "mine 1" not in shown
        assert "mine 3" not in shown

    def test_log_dir(self, scripts, tmp_path):
        script = RANK + "print('out', rank); print('\\rerr', rank, file=sys.stderr)"
        status, _ = scripts.run(script, workers=2, log_dir=str(tmp_path / "a" / "logs"))
        assert status == 0
        for i in range(2):
            text = (tmp_path / "a" / "logs" / f"worker-{i}.log").read_bytes()
            assert text == b"out %d\n\rerr %d\n" % (i, i)

    def test_start_up_noise_is_only_in_the_log(self, scripts, tmp_path):
        noise = "I0000 00:00:1795445330.992658    2957 port.cc:153] oneDNN custom operations"
        script = f"print('{noise}'); print('E0000 00:00:1.2 3 a.cc:1] real trouble')"
        _, output = scripts.run(script, log_dir=str(tmp_path))
        assert output == "worker 0 │ E0000 00:00:1.2 3 a.cc:1] real trouble\n"
        assert noise in (tmp_path / "worker-0.log").read_text()
        scripts.environ["TF_CPP_MIN_LOG_LEVEL"] = "0"
        assert noise in scripts.run(script)[1]

    def test_log_dir_that_cannot_be_written(self, scripts, tmp_path):
        (tmp_path / "file").write_text("")
        status, output = scripts.run("", log_dir=str(tmp_path / "file"))
        assert status == 1
        assert "LaunchError: `--log-dir` must be a folder" in output

    def test_only_the_chief_has_a_terminal(self, scripts):
        outer, inner = pty.openpty()
        termios.tcsetwinsize(inner, (24, 80))
        script = RANK + (
            "time.sleep(rank)\n"
            "print('tty', sys.stdout.isatty())\n"
            "if rank == 0:\n"
            "    print('columns', os.get_terminal_size(1).columns)\n"
            "    for i in range(3):\n"
            "        sys.stdout.write(f'\\b\\b\\b\\r{i}/3')\n"
            "        while not os.path.exists(f'seen-{i}'): time.sleep(0.02)\n"
        )
        scripts.environ["TERM"] = "xterm"
        launcher = scripts.start(script, stdout=inner, workers=2)
        os.close(inner)
        received = b""
        try:
            while data := os.read(outer, 4096):
                received += data
                for i in range(3):
                    if f"{i}/3".encode() in received:
                        (scripts.folder / f"seen-{i}").touch()
        except OSError:
            pass
        os.close(outer)
        assert launcher.wait(LIMIT_S) == 0
        text = received.decode()
        assert "\x1b[36mworker 0 │\x1b[0m tty True" in text
        assert "columns 69" in text
        assert "\x1b[35mworker 1 │\x1b[0m tty False" in text
        for i in (1, 2):
            assert f"\r\x1b[K\x1b[36mworker 0 │\x1b[0m {i}/3" in text


@quick
class TestLines:
    @pytest.mark.parametrize(
        ("line", "shown"),
        [
            ("plain", "plain"),
            ("1/2\r2/2", "2/2"),
            ("1/2\b\b\b\r2/2\r", "2/2"),
            ("1/2 10ms\b\b\b\b\b\b\b\b\r2/2 9ms ", "2/2 9ms"),
            ("ab\bc", "ac"),
            ("\b\b\rx", "x"),
            ("done\r\n".rstrip("\n"), "done"),
            ("\x1b[1mbold\x1b[0m\x1b[K\x1b[2A", "\x1b[1mbold\x1b[0m"),
            ("", ""),
        ],
    )
    def test_settled(self, line, shown):
        assert settled(line) == shown

    def test_cut_anywhere(self):
        text = "eins │ ━━\nzwei\r\n\ndrei\b\b\b\b\rvier\n"
        for size in range(1, 9):
            lines = LineSplitter()
            data = text.encode()
            found = [
                line
                for start in range(0, len(data), size)
                for line in lines.feed(data[start : start + size])
            ]
            assert found == ["eins │ ━━", "zwei", "", "vier"]

    def test_progress_bar_does_not_pile_up(self):
        lines = LineSplitter()
        tracemalloc.start()
        try:
            for i in range(10_000):
                lines.feed(b"\b" * 20 + b"\r" + b"%20d" % i)
            kept, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert kept < 20_000  # of 410,000 bytes
        assert lines.unfinished == f"{9999:20d}"
        assert lines.finish() == [f"{9999:20d}"]

    def test_stream_without_the_bar_character(self, tmp_path):
        with (tmp_path / "out").open("w", encoding="ascii") as stream:
            Screen(stream, ["worker 0"]).show(0, ["━ é"])
        assert (tmp_path / "out").read_text() == "worker 0 | ? ?\n"

    def test_prefixes_are_equally_wide(self, tmp_path):
        with (tmp_path / "out").open("w", encoding="utf-8") as stream:
            screen = Screen(stream, ["worker 9", "worker 10"])
            screen.show(0, ["a", ""])
            screen.show(1, ["\x1b[1mb\x1b[0m"])
        assert (tmp_path / "out").read_text() == "worker 9  │ a\nworker 9  │\nworker 10 │ b\n"


@quick
def test_what_is_withheld_has_an_end() -> None:
    hidden_output = HiddenOutput()
    assert hidden_output.take([f"line {i}" for i in range(1000)]) == []
    first, *rest = hidden_output.release()
    assert first == "tfdist: 600 earlier lines are left out; --output all shows all."
    assert (rest[0], rest[-1], len(rest)) == ("line 600", "line 999", 400)
    assert hidden_output.release() == []


def failure(index: int, *lines: str, returncode: int = 1) -> Failure:
    return Failure(Worker(index, (), {}), returncode, lines)


@quick
class TestCause:
    OWN = ("Traceback (most recent call last):", '  File "a.py"', "ValueError: mine")
    PEER = (
        "Traceback (most recent call last):",
        '  File "a.py"',
        "errors.UnavailableError: gone",
    )

    def test_own_exception_comes_first(self):
        peer, own = failure(0, *self.PEER), failure(1, *self.OWN)
        assert root_cause([peer, own]) is own
        assert root_cause([own, peer]) is own

    def test_farewell_after_an_own_exception_does_not_count(self):
        own = failure(1, *self.OWN, "E0 coordination service: heartbeat missed")
        assert not own.blames_peer
        assert root_cause([failure(0, *self.PEER), own]) is own

    def test_first_where_all_are_alike(self):
        first = failure(2, *self.PEER)
        assert root_cause([first, failure(0, *self.PEER)]) is first

    def test_without_a_traceback(self):
        assert failure(0, "F0 Terminating: missed heartbeat", returncode=-6).blames_peer
        assert not failure(0, "Segmentation fault", returncode=-11).blames_peer
        assert not failure(0, returncode=-9).blames_peer

    def test_excerpt_is_the_last_traceback(self):
        assert failure(0, "noise", *self.PEER, "more", *self.OWN).excerpt() == self.OWN

    def test_long_excerpt_keeps_head_exception_and_end(self):
        frames = [f"  File {i}" for i in range(50)]
        message = [f"detail {i}" for i in range(50)]
        lines = failure(0, self.OWN[0], *frames, "ValueError: mine", *message).excerpt()
        assert len(lines) == 20
        assert lines[0] == self.OWN[0]
        assert "ValueError: mine" in lines
        assert lines[-1] == "detail 49"

    def test_without_a_traceback_the_last_lines(self):
        assert failure(0, *map(str, range(50))).excerpt() == tuple(map(str, range(30, 50)))

    def test_describes_signals(self):
        killed = failure(3, returncode=-9)
        assert killed.status == 137
        assert killed.describe().startswith("worker 3 was ended by signal 9 (SIGKILL).")


@quick
class TestHosts:
    def test_list(self):
        assert parse_hosts("a:2, b ,[::1]:3") == (Host("a", 2), Host("b"), Host("[::1]", 3))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "names none"),
            ("a,,b", "names none"),
            (":2", "names none"),
            ("::1:2", "names none"),
            ("a:0", "'0' slots"),
            ("a:-1", "'-1' slots"),
            ("a:x", "'x' slots"),
            ("a:", "'' slots"),
            ("a:2:17380", "'2:17380' slots"),
            ("a,b,a:2", "'a' is given twice"),
        ],
    )
    def test_malformed(self, text, message):
        with pytest.raises(ClusterError, match=f"`--hosts` must .* Received: .*{message}"):
            parse_hosts(text)

    def test_addresses(self):
        assert worker_addresses(parse_hosts("a:2,b"), 100) == ("a:100", "a:101", "b:102")
        with pytest.raises(ClusterError, match="--port=65535"):
            worker_addresses(parse_hosts("a:2"), 65535)


@quick
class TestPlan:
    def test_one_worker_has_no_cluster(self, environ):
        (worker,) = plan_workers(["x"], environ=environ)
        assert "TF_CONFIG" not in worker.environment
        assert worker.command == ("x",)
        assert worker.environment["TFDIST_LOCAL_SIZE"] == "1"
        assert "TFDIST_STRATEGY" not in worker.environment
        assert "TFDIST_DROP_IN" not in worker.environment

    def test_one_worker_keeps_the_cluster_it_was_given(self, environ):
        environ["TF_CONFIG"] = (
            '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 1}}'
        )
        (worker,) = plan_workers(["x"], environ=environ)
        assert worker.environment["TF_CONFIG"] == environ["TF_CONFIG"]
        with pytest.raises(LaunchError, match="TF_CONFIG already makes this process worker 1"):
            plan_workers(["x"], workers=2, environ=environ)

    def test_one_process_is_shown_by_its_rank_in_the_cluster(self, environ):
        for type_, index, task in [
            ("chief", 0, "worker 0"),
            ("worker", 0, "worker 1"),
            ("evaluator", 0, "evaluator 0"),
        ]:
            environ["TF_CONFIG"] = given({"chief": ["a:1"], "worker": ["b:1"]}, type_, index)
            (worker,) = plan_workers(["x"], environ=environ)
            assert worker.task == task
        servers = {"chief": ["a:1"], "worker": ["b:1"], "ps": ["c:1"]}
        environ["TF_CONFIG"] = given(servers, "ps", 0)
        (worker,) = plan_workers(["x"], strategy="parameter_server", environ=environ)
        assert worker.task == "ps 0"
        ranks = environ | {"HOROVOD_RANK": "1", "HOROVOD_SIZE": "2"}
        assert plan_workers(["x"], strategy="horovod", environ=ranks)[0].task == "worker 1"

    @pytest.mark.parametrize("strategy", ["single", "mirrored"])
    def test_a_strategy_of_one_process_does_not_split_a_cluster(self, strategy, environ):
        environ["TF_CONFIG"] = given({"worker": ["a:1", "b:1"]}, "worker", 1)
        with pytest.raises(LaunchError, match=f"--strategy={strategy}, where TF_CONFIG makes"):
            plan_workers(["x"], strategy=strategy, environ=environ)

    def test_an_evaluator_is_alone(self, environ):
        environ["TF_CONFIG"] = given({"worker": ["a:1", "b:1"]}, "evaluator", 0)
        for strategy in ("horovod", "multi_worker"):
            (worker,) = plan_workers(["x"], strategy=strategy, environ=environ)
            assert "TFDIST_STRATEGY" not in worker.environment
            assert "HOROVOD_RANK" not in worker.environment
        with pytest.raises(LaunchError, match="evaluator 0"):
            plan_workers(["x"], workers=2, environ=environ)

    @pytest.mark.parametrize(
        ("cluster", "message"),
        [
            ({"worker": ["a:1", "b:1", "a:2"]}, "side by side"),
            ({"chief": ["a:1"], "worker": ["b:1"], "ps": ["c:1"]}, "no parameter servers"),
        ],
    )
    def test_clusters_that_horovod_cannot_join(self, cluster, message, environ):
        environ["TF_CONFIG"] = given(cluster, "worker", 0)
        with pytest.raises(LaunchError, match=message):
            plan_workers(["x"], strategy="horovod", environ=environ)

    def test_several_workers(self, environ):
        workers = plan_workers(
            ["x"], workers=3, strategy="multi_worker", drop_in=True, environ=environ
        )
        configs = [json.loads(worker.environment["TF_CONFIG"]) for worker in workers]
        assert [config["task"] for config in configs] == [
            {"type": "worker", "index": i} for i in range(3)
        ]
        addresses = configs[0]["cluster"]["worker"]
        assert len(set(addresses)) == 3
        assert all(config["cluster"] == {"worker": addresses} for config in configs)
        assert all(address.startswith("127.0.0.1:") for address in addresses)
        for i, worker in enumerate(workers):
            assert worker.environment["TFDIST_LOCAL_RANK"] == str(i)
            assert worker.environment["TFDIST_LOCAL_SIZE"] == "3"
            assert worker.environment["TFDIST_STRATEGY"] == "multi_worker"
            assert worker.environment["TFDIST_DROP_IN"] == "1"
            assert worker.environment["PYTHONUNBUFFERED"] == "1"

    def test_whose_output_is_shown(self, environ):
        for options, task in [({}, "worker 0"), ({"servers": 1}, "chief")]:
            workers = plan_workers(["x"], workers=2, environ=environ, **options)
            assert workers[leader(workers)].task == task
        hosts = parse_hosts("a:1,b:2")
        options = {"hosts": hosts, "node_rank": 1, "port": free_port(), "environ": environ}
        for servers, task in [(0, "worker 1"), (2, "worker 1")]:
            workers = plan_workers(["x"], servers=servers, **options)
            assert workers[leader(workers)].task == task

    def test_threads(self, environ):
        environ["OMP_NUM_THREADS"] = "5"
        for count in (1, 2, 1000):
            worker = plan_workers(["x"], workers=count, environ=environ)[0]
            threads = str(max(1, usable_cores() // count))
            assert worker.environment["TF_NUM_INTRAOP_THREADS"] == threads
            assert worker.environment["TF_NUM_INTEROP_THREADS"] == threads
            assert worker.environment["OMP_NUM_THREADS"] == "5"

    def test_what_the_user_set_stays(self, environ):
        environ["TF_CPP_MIN_LOG_LEVEL"] = "0"
        worker = plan_workers(["x"], environ=environ)[0]
        assert worker.environment["TF_CPP_MIN_LOG_LEVEL"] == "0"
        assert not worker.is_quiet

    def test_hosts(self, environ):
        hosts = parse_hosts("a:2,b:1")
        nodes = [
            plan_workers(["x"], hosts=hosts, node_rank=i, port=25670, environ=environ)
            for i in (0, 1)
        ]
        assert [[worker.index for worker in node] for node in nodes] == [[0, 1], [2]]
        configs = [json.loads(w.environment["TF_CONFIG"]) for node in nodes for w in node]
        expected = {"worker": ["a:25670", "a:25671", "b:25672"]}
        assert all(config["cluster"] == expected for config in configs)
        assert [config["task"]["index"] for config in configs] == [0, 1, 2]

    def test_port_in_use(self, environ):
        with socket.socket() as busy:
            busy.bind(("127.0.0.1", 0))
            busy.listen()
            port = busy.getsockname()[1]
            hosts = parse_hosts("127.0.0.1,elsewhere")
            with pytest.raises(LaunchError, match=f"Received: port {port}"):
                plan_workers(["x"], hosts=hosts, node_rank=0, port=port, environ=environ)
            # Another machine's port is none of this one's business.
            assert plan_workers(["x"], hosts=hosts, node_rank=1, port=port, environ=environ)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"workers": 0}, "Received: -n 0"),
            ({"workers": 2, "strategy": "mirrored"}, "--strategy=mirrored with 2 workers"),
            ({"strategy": "magic"}, "--strategy=magic"),
            ({"node_rank": 0}, "--node-rank=0 without --hosts"),
            ({"hosts": "a,b"}, "--node-rank=None"),
            ({"hosts": "a,b", "node_rank": 2}, "--node-rank=2"),
            ({"hosts": "a,b", "node_rank": -1}, "--node-rank=-1"),
            ({"hosts": "a,b", "node_rank": 0, "workers": 3}, "-n 3, --hosts with 2 slots"),
        ],
    )
    def test_contradictions(self, options, message, environ):
        if "hosts" in options:
            options = options | {"hosts": parse_hosts(options["hosts"])}
        with pytest.raises(LaunchError, match=message):
            plan_workers(["x"], environ=environ, **options)

    def test_free_addresses_are_different(self):
        assert len(set(free_addresses(50))) == 50


@quick
class TestGpus:
    def test_split_evenly(self):
        shares = gpu_environments(["0", "1", "2", "3", "4"], 2)
        assert [share["CUDA_VISIBLE_DEVICES"] for share in shares] == ["0,1", "2,3"]

    def test_nothing_to_split(self):
        assert gpu_environments([], 2) == ({}, {})
        assert gpu_environments(["0", "1"], 1) == ({},)

    def test_fewer_than_workers(self):
        with pytest.raises(LaunchError, match="2 workers and 1 GPU, number 3"):
            gpu_environments(["3"], 2)

    @pytest.mark.parametrize(
        ("value", "gpus"),
        [
            ("0,1", ("0", "1")),
            ("", ()),
            ("-1", ()),
            ("2,-1,3", ("2",)),
            ("GPU-a1", ("GPU-a1",)),
        ],
    )
    def test_visible(self, value, gpus):
        assert visible_gpus({"CUDA_VISIBLE_DEVICES": value}) == gpus

    def test_visible_to_nvidia_smi(self, tmp_path):
        assert visible_gpus({"PATH": str(tmp_path)}) == ()
        program = tmp_path / "nvidia-smi"
        program.write_text("#!/bin/sh\nprintf 'GPU 0: A (UUID: a)\\nGPU 1: A (UUID: b)\\n'\n")
        program.chmod(0o755)
        assert visible_gpus({"PATH": str(tmp_path)}) == ("0", "1")

    def test_workers_get_their_share(self, environ):
        environ["CUDA_VISIBLE_DEVICES"] = "4,5,6,7"
        workers = plan_workers(["x"], workers=2, environ=environ)
        shares = [worker.environment["CUDA_VISIBLE_DEVICES"] for worker in workers]
        assert shares == ["4,5", "6,7"]


@waits
@cluster
def test_two_launchers_make_one_cluster(scripts):
    """Two names of this machine stand for two machines."""
    port = free_port()
    script = "import os; print(os.environ['TF_CONFIG'])"
    hosts = "127.0.0.1:2,localhost:1"
    launchers = [
        scripts.start(script, hosts=hosts, node_rank=node_rank, port=port)
        for node_rank in (0, 1)
    ]
    lines = []
    for launcher in launchers:
        output, _ = launcher.communicate(timeout=LIMIT_S)
        assert launcher.returncode == 0
        lines += output.splitlines()
    lines.sort()
    assert [line.partition(" │ ")[0] for line in lines] == [f"worker {i}" for i in range(3)]
    configs = [json.loads(line.partition(" │ ")[2]) for line in lines]
    addresses = [f"127.0.0.1:{port}", f"127.0.0.1:{port + 1}", f"localhost:{port + 2}"]
    assert all(config["cluster"] == {"worker": addresses} for config in configs)
    assert [config["task"]["index"] for config in configs] == [0, 1, 2]


@waits
@cluster
class TestRestarts:
    COUNT = """
import sys, time
from pathlib import Path
from tfdist.cluster import heartbeat
from tfdist.scripts.worker_main import follow_launcher

follow_launcher()
heartbeat.share_with_launcher()
starts = len(list(Path().glob("start-*")))
Path(f"start-{starts}").touch()
steps = [int(text) for text in sys.argv[1].split(",")]
if starts == len(steps):
    heartbeat.here.record_steps(0, 9, 1)
    time.sleep(0.2)
    sys.exit(0)
if steps[starts]:
    heartbeat.here.record_steps(1, steps[starts], 1)
    time.sleep(0.2)
"""
    RAISE = COUNT + "raise ValueError('no luck')\n"
    EXIT = COUNT + "sys.exit(int(sys.argv[2]))\n"

    def test_each_is_listed_and_training_goes_on(self, scripts):
        status, output = scripts.run(self.RAISE, "3,4", max_restarts=5)
        assert status == 0, output
        first, second = output.partition("2 restarts:\n")[2].splitlines()
        what = "worker 0 ended with exit status 1. The next step was made"
        assert f"after step 3 of epoch 2: {what}" in first
        assert f"after step 4 of epoch 2: {what}" in second

    def test_the_same_failure_twice_at_a_step_ends_the_run(self, scripts):
        status, output = scripts.run(self.RAISE, "3,4,4", max_restarts=5)
        assert status == 1
        assert "REPEATED" in output
        assert "2 restarts:" in output
        assert "ValueError: no luck" in output.partition("CAUSE")[2]
        assert len(list(scripts.folder.glob("start-*"))) == 3

    def test_before_the_first_step_it_counts_too(self, scripts):
        status, output = scripts.run(self.EXIT, "0,0", "7", max_restarts=5)
        assert status == 7
        assert "before its first step: worker 0 ended with exit status 7." in output

    def test_what_somebody_has_interrupted_is_not_started_again(self, scripts):
        status, _ = scripts.run(self.EXIT, "3,4", "130", max_restarts=5)
        assert status == 130
        assert len(list(scripts.folder.glob("start-*"))) == 1


@waits
@cluster
class TestElastic:
    # The place with GPU "7" is broken; what "once" names is broken once.
    WORK = """
import os, sys, time
from pathlib import Path
from tfdist.scripts.worker_main import follow_launcher

follow_launcher()
gpu = os.environ.get("CUDA_VISIBLE_DEVICES")
print("on", gpu, "of", os.environ["TFDIST_LOCAL_SIZE"], flush=True)
if gpu == "7":
    sys.exit(3)
time.sleep(1)
once = Path("once")
if gpu == "9" and os.environ["TFDIST_LOCAL_SIZE"] == "2" and not once.exists():
    once.touch()
    sys.exit(4)
time.sleep(1)
"""

    def test_a_place_that_fails_twice_is_left_out_and_tried_again_later(self, scripts):
        scripts.environ["CUDA_VISIBLE_DEVICES"] = "5,7,9"
        status, output = scripts.run(self.WORK, workers=3, least=2, max_restarts=5)
        assert status == 0, output
        causes = [line.partition("worker ")[2] for line in output.splitlines() if ". " in line]
        lasts = [line for line in causes if "ended with exit status" in line][-4:]
        assert [line.partition(".")[0] for line in lasts] == [
            "1 ended with exit status 3",  # tried once more
            "1 ended with exit status 3",  # left out
            "1 ended with exit status 4",  # GPU 9's: all are tried
            "1 ended with exit status 3",  # left out at once
        ]
        assert "now 2 in all (2 of 5)" in output
        assert "now 3 in all (3 of 5)" in output
        assert "now 2 in all (4 of 5)" in output
        ends = [line.partition("on ")[2] for line in output.splitlines() if " of 2" in line]
        assert sorted(ends) == ["5 of 2", "5 of 2", "9 of 2", "9 of 2"]

    def test_fewer_than_the_least_are_not_tried(self, scripts):
        scripts.environ["CUDA_VISIBLE_DEVICES"] = "5,7"
        status, output = scripts.run(self.WORK, workers=2, least=2, max_restarts=5)
        assert status == 3
        assert "REPEATED" in output


@waits
@cluster
class TestTogether:
    """Two names of this machine stand for two machines."""

    WORK = """
import json, os, sys, time
from pathlib import Path
from tfdist.cluster import heartbeat
from tfdist.scripts.worker_main import follow_launcher

follow_launcher()
heartbeat.share_with_launcher()
me = json.loads(os.environ.get("TF_CONFIG", '{"task": {"index": 0}}'))["task"]["index"]
Path(f"pid-{me}-{os.getpid()}").write_text(f"{os.getpid()}\\n")
heartbeat.here.record_steps(0, 1, 1)
if me == 1 and sys.argv[1] == "fail" and not Path("failed").exists():
    while len(list(Path().glob("pid-*"))) < 2:  # all of a start are there
        time.sleep(0.02)
    Path("failed").touch()
    sys.exit(3)
if me == 1 and sys.argv[1] == "always":
    sys.exit(3)
while not Path("end").exists():
    time.sleep(0.02)
"""

    @pytest.fixture
    def start(self, scripts):
        port = free_port()

        def start(node_rank: int, mode: str, script: str = self.WORK, **options):
            options = {"max_restarts": 3, "port": port, **options}
            return scripts.start(
                script, mode, hosts="127.0.0.1,localhost", node_rank=node_rank, **options
            )

        return start

    def test_a_failure_starts_all_again(self, start, scripts):
        launchers = [start(0, "fail"), start(1, "fail")]
        scripts.pids(4)
        (scripts.folder / "end").touch()
        for launcher in launchers:
            output, _ = launcher.communicate(timeout=LIMIT_S)
            assert launcher.returncode == 0, output
            assert "All are started again on all hosts (1 of 3)" in output
            assert "after step 1 of epoch 1: worker 1 ended with exit status 3." in output

    # The second host has a server and a worker, and no chief.
    SERVED = """
import json, os, signal, sys, time
from pathlib import Path
from tfdist.scripts.worker_main import follow_launcher

follow_launcher()
task = json.loads(os.environ["TF_CONFIG"])["task"]
name = f"{task['type']}-{task['index']}"
Path(f"pid-{name}-{os.getpid()}").write_text(f"{os.getpid()}\\n")
if name == "ps-1" and "killed" in sys.argv and not Path("killed").exists():
    while len(list(Path().glob("pid-*"))) < 5:  # all of a start are there
        time.sleep(0.02)
    Path("killed").touch()
    os.kill(os.getpid(), signal.SIGKILL)
is_chief = name == "chief-0"
while not Path("go" if is_chief else "end").exists():
    time.sleep(0.02)
Path("end" if is_chief else f"served-{name}").touch()
"""

    def test_a_host_that_only_serves_stays_until_the_chief_has_ended(self, start, scripts):
        options = {"script": self.SERVED, "servers": 2, "max_restarts": 0}
        launchers = [start(rank, "stay", **options) for rank in (0, 1)]
        scripts.pids(5)
        (scripts.folder / "go").touch()
        outputs = [launcher.communicate(timeout=LIMIT_S)[0] for launcher in launchers]
        assert [launcher.returncode for launcher in launchers] == [0, 0], outputs
        assert (scripts.folder / "served-ps-1").exists()
        assert (scripts.folder / "served-worker-1").exists()

    def test_a_host_that_only_serves_tells_what_failed(self, start, scripts):
        options = {"script": self.SERVED, "servers": 2}
        launchers = [start(rank, "killed", **options) for rank in (0, 1)]
        eventually(lambda: len(list(scripts.folder.glob("pid-ps-1-*"))) == 2)
        eventually(lambda: len(list(scripts.folder.glob("pid-chief-0-*"))) == 2)
        (scripts.folder / "go").touch()
        outputs = [launcher.communicate(timeout=LIMIT_S)[0] for launcher in launchers]
        assert [launcher.returncode for launcher in launchers] == [0, 0], outputs
        for output in outputs:
            assert "ps 1 was ended by signal 9 (SIGKILL)" in output

    def test_the_same_failure_twice_ends_all(self, start, scripts):
        launchers = [start(0, "always"), start(1, "always")]
        outputs = [launcher.communicate(timeout=LIMIT_S)[0] for launcher in launchers]
        assert [launcher.returncode for launcher in launchers] == [3, 3], outputs
        assert all("REPEATED" in output for output in outputs)
        assert "ELSEWHERE worker 1 ended with exit status 3." in outputs[0]
        assert "CAUSE\nworker 1 ended with exit status 3." in outputs[1]

    @pytest.mark.parametrize("lost", [0, 1])
    def test_a_host_that_is_lost_comes_back(self, lost, start, scripts):
        launchers = [start(0, "stay"), start(1, "stay")]
        pids = scripts.pids(2)
        launchers[lost].kill()
        launchers[lost].wait(LIMIT_S)
        eventually(lambda: all(map(is_gone, pids)))
        launchers[lost] = start(lost, "stay")
        scripts.pids(4)
        (scripts.folder / "end").touch()
        outputs = [launcher.communicate(timeout=LIMIT_S)[0] for launcher in launchers]
        assert [launcher.returncode for launcher in launchers] == [0, 0], outputs
        assert "1 restart:" in outputs[1 - lost]
        name = "node 0 is lost" if lost == 0 else "node 1 (localhost) is lost"
        assert name in outputs[1 - lost]

    def test_a_host_that_does_not_come_back_ends_the_run(self, start, scripts):
        launchers = [start(0, "stay", limit=5), start(1, "stay", limit=5)]
        scripts.pids(2)
        launchers[1].kill()
        output, _ = launchers[0].communicate(timeout=LIMIT_S)
        assert launchers[0].returncode == 75, output
        assert "node 1 (localhost) did not come within 5 s (--node-timeout)." in output

    def test_an_elastic_run_goes_on_without_it_and_takes_it_in_at_the_next_restart(
        self, start, scripts
    ):
        options = {"limit": 3, "least": 1}
        launchers = [start(0, "stay", **options), start(1, "stay", **options)]
        scripts.pids(2)
        launchers[1].kill()
        launchers[1].wait(LIMIT_S)
        alone = scripts.pids(3)
        launchers[1] = start(1, "stay", **options)
        time.sleep(3)
        assert len(scripts.pids(3)) == 3  # it waits
        (pid,) = (pid for pid in alone if not is_gone(pid))
        os.kill(pid, signal.SIGKILL)
        scripts.pids(5)
        (scripts.folder / "end").touch()
        outputs = [launcher.communicate(timeout=LIMIT_S)[0] for launcher in launchers]
        assert [launcher.returncode for launcher in launchers] == [0, 0], outputs
        assert "2 restarts:" in outputs[0]

    def test_a_launcher_of_other_settings_is_refused(self, start, scripts):
        first = start(0, "stay")
        second = start(1, "stay", max_restarts=4)
        output, _ = second.communicate(timeout=LIMIT_S)
        assert second.returncode == 1
        assert "`--max-restarts` must be the same on all hosts. Received: 3 on node 0" in output
        first.send_signal(signal.SIGINT)
        first.communicate(timeout=LIMIT_S)
        assert first.returncode == 130

    def test_a_launcher_without_the_token_is_refused(self, start, scripts):
        scripts.environ["TFDIST_TOKEN"] = "x"
        start(0, "stay")
        scripts.environ["TFDIST_TOKEN"] = "y"
        second = start(1, "stay")
        output, _ = second.communicate(timeout=LIMIT_S)
        assert second.returncode == 1
        assert "The token of all launchers must be the same." in output
