from __future__ import annotations

import json
import os
import py_compile
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner

import tfdist
from tfdist import cli
from tfdist.cluster import Cluster
from tfdist.launch import Outcome
from tfdist.launch.doctor import Device, DoctorReport, Readiness

LIMIT_S = 240
COMMAND = [sys.executable, "-m", "tfdist.cli"]


@pytest.fixture
def environ() -> dict[str, str]:
    ours = ("TF_", "SLURM_", "TFDIST_", "OMP_", "CUDA_", "KERAS_")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


@pytest.fixture
def script(tmp_path) -> Path:
    path = tmp_path / "train.py"
    path.write_text("")
    return path


@pytest.fixture
def most() -> list[int]:
    return []


@pytest.fixture
def planned(monkeypatch, most) -> list[tuple]:
    """What `tfdist run` would have started, and how often again."""
    runs: list[tuple] = []

    def note(workers, log_dir=None, restarts=None, **options):
        most.append(restarts.limit.count)
        runs.append((workers, log_dir))
        return Outcome(0)

    monkeypatch.setattr(cli.run, "run_workers", note)
    return runs


def invoke(*arguments: str):
    return CliRunner().invoke(cli.main, list(arguments))


@pytest.mark.quick
class TestRun:
    def test_what_follows_the_script_is_the_scripts(self, script, planned):
        result = invoke(
            "run", "-n", "2", str(script), "-n", "3", "--help", "--", "--x=1", "y z"
        )
        assert result.exit_code == 0, result.output
        ((workers, log_dir),) = planned
        assert log_dir is None
        assert len(workers) == 2
        expected = (
            "-m",
            "tfdist.scripts.worker_main",
            str(script),
            "-n",
            "3",
            "--help",
            "--",
            "--x=1",
            "y z",
        )
        assert workers[0].command[1:] == expected

    def test_parameter_servers(self, script, planned, most):
        assert invoke("run", "-n", "2", "--ps", "1", str(script)).exit_code == 0
        assert [w.task for w in planned[0][0]] == ["chief", "ps 0", "worker 0", "worker 1"]
        assert invoke("run", "--ps", "1", "--max-restarts", "7", str(script)).exit_code == 0
        assert invoke("run", str(script)).exit_code == 0
        assert most == [3, 7, 0]

    def test_a_mesh_comes_to_the_workers(self, script, planned, monkeypatch):
        monkeypatch.setenv("TFDIST_MESH", "")  # so that it is as before afterwards
        mesh = ("--mesh", "batch=1,model=2")
        assert invoke("run", "-n", "2", *mesh, str(script)).exit_code == 0
        assert {w.environment["TFDIST_MESH"] for w in planned[0][0]} == {"batch=1,model=2"}
        for refused in (["--mesh", "model=x"], [*mesh, "--zero", "1"], [*mesh, "--ps", "1"]):
            result = invoke("run", "-n", "2", *refused, str(script))
            assert result.exit_code == 2
            assert "--mesh" in result.output

    def test_zero_comes_to_the_workers(self, script, planned, monkeypatch):
        monkeypatch.setenv("TFDIST_ZERO", "")  # so that it is as before afterwards
        assert invoke("run", "-n", "2", "--zero", "1", str(script)).exit_code == 0
        assert {w.environment["TFDIST_ZERO"] for w in planned[0][0]} == {"1"}
        for refused in (["--zero", "2"], ["--zero", "1", "--ps", "1"]):
            result = invoke("run", *refused, str(script))
            assert result.exit_code == 2
            assert "--zero must" in result.output

    def test_one_worker_unless_told(self, script, planned):
        assert invoke("run", str(script)).exit_code == 0
        assert len(planned[0][0]) == 1

    def test_hosts_give_the_number_of_workers(self, script, planned):
        hosts = ["--hosts", "localhost:3,127.0.0.1:2", "--node-rank", "1", "--port", "25680"]
        assert invoke("run", *hosts, str(script)).exit_code == 0
        assert [worker.index for worker in planned[0][0]] == [3, 4]

    def test_module(self, planned, tmp_path, monkeypatch):
        (tmp_path / "package").mkdir()
        (tmp_path / "package" / "train.py").write_text("")
        monkeypatch.chdir(tmp_path)
        assert invoke("run", "-m", "package.train", "-m").exit_code == 0
        command = planned[0][0][0].command
        assert command[1:] == ("-m", "tfdist.scripts.worker_main", "-m", "package.train", "-m")

    def test_options(self, script, planned, tmp_path):
        options = ["--strategy", "multi_worker", "--drop-in", "--log-dir", str(tmp_path / "l")]
        assert invoke("run", "-n", "2", *options, str(script)).exit_code == 0
        ((workers, log_dir),) = planned
        assert log_dir == tmp_path / "l"
        assert workers[1].environment["TFDIST_STRATEGY"] == "multi_worker"
        assert workers[1].environment["TFDIST_DROP_IN"] == "1"

    @pytest.mark.parametrize(
        ("arguments", "status", "message"),
        [
            (["-n", "0", "SCRIPT"], 1, "Error: The number of workers must be 1 or more."),
            (["-n", "x", "SCRIPT"], 2, "'x' is not a valid integer"),
            (["-n", "2", "--strategy", "single", "SCRIPT"], 1, "Error: Strategy 'single'"),
            (["--strategy", "magic", "SCRIPT"], 2, "'magic' is not one of"),
            (["--strategy", "multi_worker", "SCRIPT"], 1, "Add -n 2, or leave --strategy out"),
            (["-n", "1", "--strategy", "multi_worker", "SCRIPT"], 1, "with 1 worker"),
            (["--hosts", "a,a", "SCRIPT"], 1, "Error: `--hosts` must name each host once."),
            (["--elastic", "3:2", "SCRIPT"], 1, "Error: `--elastic` must be two numbers"),
            (["-n", "2", "--elastic", "1:2", "SCRIPT"], 1, "--elastic must not come with -n"),
            (
                ["--hosts", "a,b", "--node-rank", "0", "--elastic", "1:3", "SCRIPT"],
                1,
                "MAX of --elastic must be the sum of the slots in --hosts, 2.",
            ),
            (["--hosts", "a,b", "SCRIPT"], 1, "Error: `--node-rank` must say"),
            (["--max-restarts", "3/x", "SCRIPT"], 1, "Error: `--max-restarts` must be"),
            (["--health", "0", "SCRIPT"], 1, "Error: `--health` must be a port"),
            (
                ["--hosts", "localhost,nowhere.invalid", "--node-rank", "0", "SCRIPT"],
                1,
                "Received: nowhere.invalid, which no name service knows after 0 s",
            ),
            (["not_there.py"], 2, "Received: 'not_there.py', which is not there."),
            ([".."], 2, "which is no file"),
            (["-m", "nopackage.mod"], 2, "there is no module 'nopackage'"),
            (["-m", "json.nothing"], 2, "there is no module 'json.nothing'"),
            (["-m", "json.tool.x"], 2, "'json.tool' is no package"),
            (["-m", "json"], 2, "'json' is a package without a module __main__"),
            ([], 2, "Missing argument 'SCRIPT'"),
            (["--unknown", "SCRIPT"], 2, "No such option '--unknown'"),
        ],
    )
    def test_wrong_use(self, arguments, status, message, script, planned, monkeypatch):
        monkeypatch.setenv("TFDIST_START_TIMEOUT", "0")
        result = invoke("run", *(str(script) if a == "SCRIPT" else a for a in arguments))
        assert result.exit_code == status
        assert message in result.output
        assert "Traceback" not in result.output
        assert not planned

    @pytest.mark.parametrize("is_module", [False, True])
    def test_a_syntax_error_is_shown_as_by_python(
        self, is_module, script, planned, monkeypatch
    ):
        script.write_text("x = 1\nif x = 2:\n    pass\n")
        monkeypatch.chdir(script.parent)
        result = invoke("run", *(["-m", "train"] if is_module else [str(script)]))
        assert result.exit_code == 1
        assert f'File "{script}", line 2\n    if x = 2:\n' in result.output
        assert "SyntaxError: invalid syntax" in result.output
        assert not planned

    def test_packages_that_only_python_can_judge_are_left_to_it(
        self, tmp_path, planned, monkeypatch
    ):
        """None is imported: their code may import TensorFlow, or have effects."""
        for name, code in (
            ("grows", "__path__.append('elsewhere')"),
            ("registers", "import sys; sys.modules[__name__ + '.inner'] = sys"),
        ):
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").write_text(f"{code}\nraise SystemExit(7)\n")
        (tmp_path / "namespace" / "deeper").mkdir(parents=True)
        (tmp_path / "namespace" / "deeper" / "__main__.py").write_text("")
        monkeypatch.chdir(tmp_path)
        for module in ("grows.inner", "registers.inner", "namespace.deeper"):
            assert invoke("run", "-m", module).exit_code == 0
        assert len(planned) == 3
        archive, compiled = tmp_path / "program.zip", tmp_path / "program.pyc"
        with zipfile.ZipFile(archive, "w") as opened:
            opened.writestr("__main__.py", "print('packed')")
        source = tmp_path / "program.py"
        source.write_text("print('compiled')")
        py_compile.compile(str(source), cfile=str(compiled))
        for path in (archive, compiled):
            assert invoke("run", str(path)).exit_code == 0
        latin = tmp_path / "latin.py"
        latin.write_bytes("# coding: latin-1\nprint('é')\n".encode("latin-1"))
        assert invoke("run", str(latin)).exit_code == 0

    def test_more_workers_than_cores(self, script, planned, monkeypatch):
        monkeypatch.setattr("tfdist.launch.resources.usable_cores", lambda: 2)
        crowded = invoke("run", "-n", "6", str(script))
        assert "tfdist: warning: 6 workers share 2 cores of this machine." in crowded.output
        for options in (["-n", "2"], ["-n", "2", "--ps", "1"]):
            assert "cores of this machine" not in invoke("run", *options, str(script)).output
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
        assert "cores of this machine" not in invoke("run", "-n", "3", str(script)).output

    def test_a_level_of_messages_never_shows_more_than_none(self, script, planned, monkeypatch):
        for level, hides in ((None, True), ("3", True), ("2", True), ("", True), ("0", False)):
            if level is not None:
                monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", level)
            else:
                monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)
            assert invoke("run", str(script)).exit_code == 0
            assert planned[-1][0][0].is_quiet is hides

    @pytest.mark.full
    def test_malformed_cluster(self, script, planned, monkeypatch):
        monkeypatch.setenv("TF_CONFIG", '{"cluster": {"worker": ["a"]}}')
        result = invoke("run", "-n", "2", str(script))
        assert result.exit_code == 1
        assert "Error: `TF_CONFIG.cluster.worker[0]` must be" in result.output

    @pytest.mark.parametrize(
        "command", [[], ["run"], ["test"], ["doctor"], ["privacy", "noise"]]
    )
    def test_help_has_an_example(self, command):
        result = invoke(*command, "--help")
        assert result.exit_code == 0
        assert "Example" in result.output

    def test_version(self):
        assert invoke("--version").output == f"tfdist {tfdist.__version__}\n"


TRAINING = ["--sample-size", "10000", "--batch-size", "100", "--delta", "1e-5"]


@pytest.mark.quick
class TestPrivacy:
    def test_epsilon(self):
        result = invoke(
            "privacy", "epsilon", *TRAINING, "--steps", "10000", "--noise-multiplier", "4"
        )
        assert result.exit_code == 0, result.output
        first, empty, *text = result.output.splitlines()
        assert first.startswith("epsilon = 0.94")
        assert not empty
        assert "10000 steps of DP-SGD" in " ".join(text)

    def test_epochs_are_steps(self):
        options = [*TRAINING, "--accountant", "rdp", "--noise-multiplier", "4"]
        by_epochs = invoke("privacy", "epsilon", *options, "--epochs", "100")
        assert (
            by_epochs.output
            == invoke("privacy", "epsilon", *options, "--steps", "10000").output
        )
        half = invoke("privacy", "epsilon", *options, "--epochs", "0.5")
        assert "50 steps of DP-SGD" in half.output.replace("\n", " ")

    def test_capacity_and_relation(self):
        options = [*TRAINING, "--steps", "10", "--noise-multiplier", "4", "--capacity", "120"]
        options += ["--relation", "replace_one"]
        result = invoke("privacy", "epsilon", *options)
        text = result.output.replace("\n", " ")
        assert "at most 120 of them kept" in text
        assert "replaced by any other" in text

    def test_noise(self):
        options = [*TRAINING, "--steps", "1000", "--target-epsilon", "1", "--accountant", "rdp"]
        result = invoke("privacy", "noise", *options)
        assert result.exit_code == 0, result.output
        noise, spent, *_ = result.output.splitlines()
        options = [*TRAINING, "--steps", "1000", "--accountant", "rdp"]
        options += ["--noise-multiplier", noise.removeprefix("noise_multiplier = ")]
        assert invoke("privacy", "epsilon", *options).output.splitlines()[0] == spent
        assert 0.99 < float(spent.removeprefix("epsilon = ")) <= 1

    @pytest.mark.parametrize(
        ("options", "status", "message"),
        [
            ([], 2, "Exactly one of --epochs and --steps must be given."),
            (["--steps", "5", "--epochs", "5"], 2, "Exactly one of"),
            (["--steps", "5", "--batch-size", "10001"], 2, "must be at most --sample-size"),
            (["--steps", "5", "--delta", "2"], 1, "Error: `delta` must be a number above 0"),
            (["--steps", "5", "--noise-multiplier", "-1"], 1, "Error: `noise_multiplier`"),
            (["--steps", "0"], 2, "Invalid value for '--steps'"),
            (["--steps", "5", "--accountant", "x"], 2, "'x' is not one of"),
        ],
    )
    def test_wrong_use(self, options, status, message):
        options = [*TRAINING, "--noise-multiplier", "1", *options]
        result = invoke("privacy", "epsilon", *options)
        assert result.exit_code == status
        assert message in result.output
        assert "Traceback" not in result.output


def test_starts_without_tensorflow(environ):
    code = (
        "import sys, tfdist.cli, tfdist.scripts.worker_main, tfdist.launch.doctor_page\n"
        "sys.exit(not {'tensorflow', 'keras', 'numpy'}.isdisjoint(sys.modules))"
    )
    asked = subprocess.run([sys.executable, "-c", code], env=environ, timeout=60, check=False)
    assert asked.returncode == 0


def test_is_a_module_too(environ):
    command = [sys.executable, "-m", "tfdist", "--version"]
    said = subprocess.run(
        command, env=environ, capture_output=True, text=True, timeout=60, check=False
    )
    assert said.stdout == f"tfdist {tfdist.__version__}\n", said.stderr


@pytest.mark.cluster
class TestWorkers:
    """Through the real bootstrap, on real TensorFlow."""

    def run(self, environ, script, *options, arguments=()):
        return subprocess.run(
            [*COMMAND, "run", *options, str(script), *arguments],
            env=environ,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )

    def test_script_runs_as_under_python(self, environ, script):
        (script.parent / "neighbour.py").write_text("word = 'found'")
        script.write_text(
            "import gc, os, sys, neighbour\n"
            "print('collecting', gc.isenabled(), gc.get_freeze_count() > 100_000)\n"
            "class Thing: pass\n"
            "import pickle; pickle.dumps(Thing())\n"
            "print(__name__, __file__ == sys.argv[0], sys.argv[1:], neighbour.word)\n"
            "print(sys.path[0] == os.path.dirname(__file__), end=' ')\n"
            "print('TFDIST_LAUNCHER_FD' in os.environ)\n"
            "sys.exit(5)\n"
        )
        ended = self.run(environ, script, arguments=("--a", "b c"))
        assert ended.returncode == 5, ended.stderr
        lines = ended.stdout.splitlines()
        assert "worker 0 │ collecting True True" in lines
        assert "worker 0 │ __main__ True ['--a', 'b c'] found" in lines
        assert lines[-1] == "worker 0 │ True False"
        assert "Error: worker 0 ended with exit status 5." in ended.stderr

    def test_two_workers_fail_for_one_reason(self, environ, script, tmp_path):
        script.write_text(
            "import json, os, time\n"
            "if json.loads(os.environ['TF_CONFIG'])['task']['index'] == 1:\n"
            "    raise ValueError('my mistake')\n"
            "time.sleep(300)\n"
        )
        ended = self.run(environ, script, "-n", "2", "--log-dir", str(tmp_path / "logs"))
        assert ended.returncode == 1
        told = [line for line in ended.stderr.splitlines() if "workers share" not in line]
        exposed, error = told[:2]
        assert re.match(
            r"tfdist: ports \d+, \d+ \(TensorFlow\) of this machine can be", exposed
        )
        assert error.startswith("Error: worker 1 ended with exit status 1.")
        shown = told[3:8]
        assert shown[0] == "  │ Traceback (most recent call last):"
        assert shown[1] == f'  │   File "{script}", line 3, in <module>'
        assert "  │ ValueError: my mistake" in shown
        log = tmp_path / "logs" / "worker-1.log"
        assert f"Its whole output: {log}" in ended.stderr
        assert "ValueError: my mistake" in log.read_text()

    @pytest.mark.full
    def test_what_a_script_sets_too_late(self, environ, script):
        environ["TF_NUM_INTRAOP_THREADS"] = "1"
        script.write_text(
            "import os, tensorflow as tf, tfdist\n"
            "cpus = tf.config.list_physical_devices('CPU')\n"
            "tf.config.set_visible_devices(cpus, 'CPU')\n"  # as it is
            "tf.config.threading.set_intra_op_parallelism_threads(1)\n"  # as it is
            "for _ in range(2): tf.config.threading.set_inter_op_parallelism_threads(7)\n"
            "own, os.environ['TF_CONFIG'] = os.environ['TF_CONFIG'], 'mine'\n"
            "tf.distribute.MultiWorkerMirroredStrategy()\n"
            "print('put back', os.environ['TF_CONFIG'] == own)\n"
            "two = [tf.config.LogicalDeviceConfiguration()] * 2\n"
            "tf.config.experimental.set_virtual_device_configuration(cpus[0], two)\n"
        )
        ended = self.run(environ, script, "-n", "2")
        assert ended.returncode == 1
        assert ended.stdout.count("Set TF_NUM_INTEROP_THREADS=7 for `tfdist run`.") == 1
        assert "TF_NUM_INTRAOP_THREADS" not in ended.stdout
        assert ended.stdout.count("the script has set TF_CONFIG after `tfdist run`") == 1
        assert "worker 0 │ put back True" in ended.stdout
        assert "set_logical_device_configuration after `tfdist run`" in ended.stderr
        assert "Start more workers with -n" in ended.stderr

    def test_malformed_cluster_is_no_traceback(self, environ, script):
        environ["TF_CONFIG"] = '{"cluster": {"worker": ["a:1", "a:1"]}}'
        ended = self.run(environ, script)
        assert ended.returncode == 1
        assert ended.stderr.startswith("Error: Each process in `TF_CONFIG.cluster`")
        assert "Traceback" not in ended.stdout + ended.stderr


class TestDoctor:
    def run(self, environ, *options, **changes):
        return subprocess.run(
            [*COMMAND, "doctor", *options],
            env=environ | {"COLUMNS": "200"} | changes,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )

    def test_here(self, environ):
        ended = self.run(environ)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        rows = {line.split()[0]: line for line in ended.stdout.splitlines() if line.strip()}
        for name in ("python", "tfdist", "tensorflow", "keras", "numpy", "horovod"):
            assert name in rows
        assert "backend tensorflow" in rows["keras"]
        assert "a single process" in rows["cluster"]
        assert "yes" in rows["single"]
        assert "tfdist run -n 2" in rows["multi_worker"]
        assert "tfdist run -n 2 --ps 1" in rows["parameter_server"]

    def test_malformed_cluster(self, environ):
        ended = self.run(environ, TF_CONFIG='{"cluster": {"worker": ["a"]}}')
        assert ended.returncode == 1
        assert "Error: `TF_CONFIG.cluster.worker[0]` must be an address" in ended.stdout
        assert "Traceback" not in ended.stdout + ended.stderr

    def test_cluster(self, environ):
        config = (
            '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 1}}'
        )
        ended = self.run(environ, TF_CONFIG=config)
        assert "this is worker 1, from TF_CONFIG" in ended.stdout
        assert "worker 1 of 2, from TF_CONFIG" in ended.stdout

    @pytest.mark.quick
    def test_a_report_in_types_of_json(self):
        cluster = Cluster({"worker": ("a:1", "b:1")}, "worker", 1, "TF_CONFIG")
        report = DoctorReport(
            {"keras": "3"},
            (Device("CPU", "/0"),),
            2,
            cluster,
            "",
            "no",
            (Readiness("a", True, "b"),),
        )
        assert json.loads(json.dumps(report.to_json())) == {
            "is_healthy": False,
            "versions": {"keras": "3"},
            "cores": 2,
            "devices": [{"kind": "CPU", "name": "/0", "model": ""}],
            "cluster": {
                "jobs": {"worker": ["a:1", "b:1"]},
                "job": "worker",
                "index": 1,
                "source": "TF_CONFIG",
                "launched": 0,
            },
            "cluster_error": "",
            "tensorflow_error": "no",
            "strategies": [{"strategy": "a", "can_run": True, "reason": "b"}],
        }

    @pytest.mark.full
    def test_json(self, environ):
        ended = self.run(environ, "--json", TF_CONFIG='{"cluster": {"worker": ["a"]}}')
        report = json.loads(ended.stdout)
        assert (ended.returncode, report["is_healthy"], report["cluster"]) == (1, False, None)
        assert report["cluster_error"].startswith("`TF_CONFIG.cluster.worker[0]` must be")
        assert report["versions"]["tfdist"] == tfdist.__version__

    @pytest.mark.full
    def test_other_keras_backend(self, environ):
        ended = self.run(environ, KERAS_BACKEND="numpy")
        assert ended.returncode == 1
        assert "Set KERAS_BACKEND=tensorflow" in ended.stdout
