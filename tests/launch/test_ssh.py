"""`tfdist run --ssh`, with a program `ssh` that runs what it gets on this machine.

It passes on the command and the standard streams as ssh does, and no variable of the launcher.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import psutil
import pytest
from click.testing import CliRunner
from rich.console import Console

from tests.jobs import QUIET, finished, free_port, is_gone
from tfdist import cli
from tfdist.cli.run import run
from tfdist.cli.ssh import task_of
from tfdist.launch import READY, parse_hosts
from tfdist.launch.doctor_hosts import ask_hosts, problems, show

LIMIT_S = 240
SSH = """#!/bin/sh
while :; do case "$1" in -o) shift 2;; -T) shift;; *) break;; esac; done
host=$1; shift
echo "$host: $*" >> "{folder}/ssh.log"
{cases}
exec env -i HOME="$HOME" PATH=/usr/bin:/bin sh -c "$*"
"""
SCRIPT = """
import os
import keras, numpy as np, tfdist

keras.utils.set_random_seed(1)
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
model.compile("sgd", "mse")
x = np.linspace(-1, 1, 256, dtype="float32").reshape(64, 4)
history = tfdist.fit(model, x, x[:, :1], batch_size=16, shuffle=False, epochs=2, verbose=0)
index = 0 if tfdist.is_chief() else 1
print("losses of", index, *history.history["loss"], flush=True)
print("told", index, os.environ["TFDIST_TOKEN"], os.environ["OF_FILE"], os.getcwd())
"""


@pytest.fixture
def ssh(tmp_path):
    """Puts the program into a folder, and gives variables with which it is found."""

    def write(cases: str = "") -> dict[str, str]:
        program = tmp_path / "bin" / "ssh"
        program.parent.mkdir(exist_ok=True)
        program.write_text(SSH.format(folder=tmp_path, cases=cases))
        program.chmod(0o755)
        return {"PATH": f"{program.parent}:{os.environ['PATH']}", "HOME": str(tmp_path)}

    return write


def command(*arguments: str, hosts: str = "127.0.0.1,localhost") -> list[str]:
    port = ["--port", str(free_port())]
    start = [sys.executable, "-m", "tfdist.cli", "run", "--hosts", hosts, "--ssh", *port]
    return [*start, *arguments]


@pytest.mark.cluster
@pytest.mark.waits
def test_one_command_trains_on_both_hosts(ssh, tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "tfdist.toml").write_text("[environment]\nOF_FILE = 'from the file'\n")
    status, printed = finished(command("--output", "all", "train.py"), LIMIT_S, ssh(), tmp_path)
    assert status == 0, printed
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    x = np.linspace(-1, 1, 256, dtype="float32").reshape(64, 4)
    alone = model.fit(x, x[:, :1], batch_size=16, shuffle=False, epochs=2, verbose=0)
    for index in (0, 1):
        line = re.search(rf"^worker {index} │ losses of {index} (.+)$", printed, re.MULTILINE)
        losses = [float(loss) for loss in line[1].split()]
        assert losses == pytest.approx(alone.history["loss"], rel=1e-5)
    told = re.findall(r"told (\d) (\S+) (.+) (\S+)$", printed, re.MULTILINE)
    assert sorted(t[0] for t in told) == ["0", "1"]
    assert {t[2:] for t in told} == {("from the file", str(tmp_path))}
    (token,) = {t[1] for t in told}  # the same on both hosts
    log = (tmp_path / "ssh.log").read_text()
    assert log.startswith("localhost: exec ")
    assert log.count("\n") == 1
    assert token not in log
    assert not (tmp_path / ".tfdist-token").exists()
    assert READY not in printed
    assert "Fatal" not in printed
    assert "Traceback" not in printed


@pytest.mark.full
@pytest.mark.cluster
def test_a_failure_on_another_host_ends_the_run_with_its_status(ssh, tmp_path):
    (tmp_path / "train.py").write_text(
        "import sys, time, tfdist\n"
        "if not tfdist.is_chief():\n    sys.exit(7)\ntime.sleep(300)\n"
    )
    began = time.monotonic()
    status, printed = finished(command("train.py"), LIMIT_S, ssh(), tmp_path)
    assert status == 7, printed
    assert "worker 1 ended with exit status 7" in printed
    assert time.monotonic() - began < 200


@pytest.mark.waits
@pytest.mark.parametrize(
    ("case", "message"),
    [('echo "Permission denied (publickey)." >&2; exit 255',
      "must be able to start on localhost. Received: exit status 255"),
     pytest.param("cd /; rm -r {folder}/work; exec env -i sh -c \"$*\"",
                  "must have the folder", marks=pytest.mark.full),
     pytest.param("exec sh -c 'exec /missing/python -m x'",
                  "Received: exit status 127 of ssh", marks=pytest.mark.full)],
)  # fmt: skip
def test_a_host_on_which_nothing_starts_is_named_at_once(ssh, tmp_path, case, message):
    work = tmp_path / "work"
    work.mkdir()
    (work / "train.py").write_text("")
    environ = ssh(case.format(folder=tmp_path))
    began = time.monotonic()
    status, printed = finished(command("train.py"), LIMIT_S, environ, work)
    assert status == 1, printed
    assert message in printed
    assert printed.count("Error: tfdist must be able to start on localhost") == 1
    assert time.monotonic() - began < 60
    if "Permission" in case:
        assert "localhost: Permission denied (publickey)." in printed


def remote_launchers_below(pid: int) -> list[psutil.Process]:
    found = psutil.Process(pid).children(recursive=True)
    return [p for p in found if "tfdist.cli.remote" in p.cmdline() and p.name() != "sh"]


@pytest.mark.waits
@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.full)]
)
def test_the_others_end_with_the_first_launcher(ssh, tmp_path, number):
    # The third host never comes, so no worker starts TensorFlow.
    (tmp_path / "train.py").write_text("")
    environ = ssh('case "$host" in 127.0.0.3) exec cat;; esac')
    first = subprocess.Popen(
        command("--max-restarts", "1", "train.py", hosts="127.0.0.1,localhost,127.0.0.3"),
        cwd=tmp_path, env={**QUIET, **environ}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not (others := remote_launchers_below(first.pid)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(2)  # it has read its task
        first.send_signal(number)
        first.communicate(timeout=60)
        assert first.returncode == (-9 if number == signal.SIGKILL else 130)
        deadline = time.monotonic() + 60
        while not all(is_gone(other.pid) for other in others):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        first.kill()
        first.wait()
        first.stdout.close()


@pytest.mark.quick
class TestCommandLine:
    @pytest.mark.parametrize(
        ("options", "message"),
        [(["--ssh"], "must come with two or more --hosts"),
         (["--hosts", "localhost:2", "--ssh"], "must come with two or more --hosts"),
         (["--hosts", "localhost,b", "--ssh", "--node-rank", "1"], "without --node-rank"),
         (["--hosts", "192.0.2.7,localhost", "--ssh"], "must be the first of --hosts")],
    )  # fmt: skip
    def test_refused(self, options, message, tmp_path):
        (tmp_path / "train.py").write_text("")
        result = CliRunner().invoke(cli.main, ["run", *options, str(tmp_path / "train.py")])
        assert result.exit_code == 1
        assert message in result.output

    def test_the_others_get_the_options_of_the_first(self, monkeypatch):
        monkeypatch.setenv("TFDIST_TOKEN", "t" * 32)
        monkeypatch.setenv("NCCL_DEBUG", "WARN")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
        given = [
            "--hosts", "a:2,b:1", "--ssh", "--port", "1234", "--zero", "1", "--drop-in",
            "--grace", "7", "--log-dir", "logs", "--max-restarts", "3/1h", "--health", "80",
            "--strategy", "multi_worker", "-m", "pkg.train", "--epochs", "5", "--", "x y",
        ]  # fmt: skip
        with run.make_context("run", list(given)) as ctx:
            task = task_of(ctx, can_return=True)
            mine = dict(ctx.params)
        with run.make_context("run", list(task.arguments)) as ctx:
            theirs = dict(ctx.params)
        differ = {name for name in mine if mine[name] != theirs[name]}
        assert differ == {"ssh", "joined", "output", "health"}
        assert theirs["output"] == "failed"
        assert theirs["joined"]
        assert task.environment["NCCL_DEBUG"] == "WARN"
        assert "CUDA_VISIBLE_DEVICES" not in task.environment
        assert "t" * 32 not in " ".join(task.arguments)
        assert Path(task.folder) == Path.cwd()


def report_of(**versions: str) -> str:
    same = {"python": "3.11.7", "tfdist": "1", "tensorflow": "2", "keras": "3", "horovod": "-"}
    report = {"versions": {**same, **versions}, "cores": 4, "devices": []}
    return json.dumps({**report, "tensorflow_error": "", "cluster_error": ""})


@pytest.mark.quick
def test_the_doctor_compares_hosts(ssh, tmp_path, monkeypatch):
    (tmp_path / "same").write_text(report_of())
    (tmp_path / "newer").write_text(report_of(keras="4"))
    cases = (
        'case $host in same|newer) echo Welcome; cat "{folder}/$host"; exit 0;; esac\n'
        "case $host in slow) exec sleep 60;; esac\n"
        'echo "Permission denied" >&2; exit 255'
    )
    for name, value in ssh(cases.format(folder=tmp_path)).items():
        monkeypatch.setenv(name, value)
    hosts = parse_hosts("127.0.0.1,same,newer,slow,closed")
    answers = ask_hosts(hosts, json.loads(report_of()), limit=2.0)
    assert [each.report is not None for each in answers] == [True, True, True, False, False]
    newer, slow, closed = problems(answers)
    assert newer.startswith("newer has keras 4, and 127.0.0.1 has 3. Install the same")
    assert slow.startswith("slow: It must answer over ssh. Received: nothing for 2 s. Try: ssh")
    assert closed.startswith("closed: It must answer over ssh. Received: Permission denied (")
    assert closed.endswith("-m tfdist.cli doctor --json")
    shown = io.StringIO()
    show(answers, Console(file=shown, width=120))
    assert shown.getvalue().count("no answer") == 2
    assert not problems(answers[:2])


@pytest.mark.full
def test_the_doctor_asks_a_host(ssh):
    asking = [
        sys.executable,
        "-m",
        "tfdist.cli",
        "doctor",
        "--hosts",
        "127.0.0.1,other",
        "--json",
    ]
    status, printed = finished(asking, LIMIT_S, ssh())
    assert status == 0, printed
    answers = json.loads(printed[printed.index("{") :])
    assert answers["problems"] == []
    assert answers["hosts"]["other"]["versions"] == answers["hosts"]["127.0.0.1"]["versions"]
