"""`tfdist.toml`: what `tfdist config` writes, and what `tfdist run` reads of it."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from tfdist import cli
from tfdist.launch import Outcome

pytestmark = pytest.mark.quick


class Folder:
    """A folder with a script and a `tfdist.toml`, and what `tfdist run` would start there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: list[tuple] = []

    def write(self, text: str, name: str = "tfdist.toml") -> None:
        (self.path / name).write_text(text)

    def invoke(self, *arguments: str, status: int = 0, stdin: str | None = None) -> str:
        result = CliRunner().invoke(cli.main, list(arguments), input=stdin)
        assert result.exit_code == status, result.output
        assert "Traceback" not in result.output
        return result.output

    def run(self, *options: str, status: int = 0) -> str:
        return self.invoke("run", *options, "train.py", status=status)

    @property
    def workers(self) -> tuple:
        return self.runs[-1][0]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Folder:
    here = Folder(tmp_path)
    (tmp_path / "train.py").write_text("")
    monkeypatch.chdir(tmp_path)
    for name in ("TF_CONFIG", "MY_SETTING", "MY_NUMBER"):
        monkeypatch.setenv(name, "")  # so that it is as before afterwards
        monkeypatch.delenv(name)
    monkeypatch.setattr("tfdist.launch.resources.usable_cores", lambda: 64)

    def note(workers, **options):
        here.runs.append((workers, options))
        return Outcome(0)

    monkeypatch.setattr(cli.run, "run_workers", note)
    return here


class TestRun:
    def test_reads_the_file_and_names_it(self, folder):
        folder.write(
            'workers = 3\nstrategy = "multi_worker"\ndrop-in = true\noutput = "failed"\n'
            "max-restarts = 5\ngrace = 2\n"
            '[environment]\nMY_SETTING = "a b"\nMY_NUMBER = 7\n'
        )
        told = folder.run()
        assert (
            "tfdist: from tfdist.toml: --workers 3, --strategy multi_worker, --drop-in, "
            "--output failed, --max-restarts 5, --grace 2, environment MY_SETTING, "
            "environment MY_NUMBER\n"
        ) in told
        assert len(folder.workers) == 3
        for worker in folder.workers:
            assert worker.environment["TFDIST_STRATEGY"] == "multi_worker"
            assert worker.environment["TFDIST_DROP_IN"] == "1"
            assert worker.environment["MY_SETTING"] == "a b"
            assert worker.environment["MY_NUMBER"] == "7"
        options = folder.runs[-1][1]
        assert (options["shows"], options["grace"]) == ("failed", 2)
        assert options["restarts"].limit.count == 5

    def test_the_command_line_and_the_shell_win(self, folder, monkeypatch):
        monkeypatch.setenv("MY_SETTING", "of the shell")
        folder.write('workers = 3\noutput = "all"\n[environment]\nMY_SETTING = "x"\n')
        told = folder.run("-n", "2")
        assert "tfdist: from tfdist.toml: --output all\n" in told
        assert len(folder.workers) == 2
        assert folder.workers[0].environment["MY_SETTING"] == "of the shell"

    def test_other_numbers_of_workers_replace_those_of_the_file(self, folder):
        folder.write('hosts = ["localhost:2", "127.0.0.1:1"]\nport = 25690\n')
        folder.run("--node-rank", "1")
        assert [worker.index for worker in folder.workers] == [2]
        assert "--hosts" not in folder.run("-n", "2")
        assert [worker.index for worker in folder.workers] == [0, 1]
        folder.run("--elastic", "1:3", "--node-rank", "0", "--max-restarts", "0")
        assert len(folder.workers) == 2
        folder.write("workers = 9\n")
        folder.run("--hosts", "localhost:2", "--port", "25690")
        assert len(folder.workers) == 2

    def test_a_file_of_another_name(self, folder):
        folder.write("workers = 9\n")
        folder.write("workers = 2\n", "two.toml")
        assert "from two.toml: --workers 2" in folder.run("--config", "two.toml")
        assert len(folder.workers) == 2
        assert "tfdist:" not in folder.run("--config", os.devnull)
        assert len(folder.workers) == 1
        folder.run("--config", "none.toml", status=2)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("worker = 2", "Received: worker = 2. Write workers."),
            ("node-rank = 0", "Give --node-rank on the command line"),
            ("magic = 1", "They are workers, ps, "),
            ('workers = "2"', "workers in tfdist.toml must be a whole number."),
            ("workers = true", "must be a whole number. Received: workers = True."),
            ("drop-in = 1", "drop-in in tfdist.toml must be true or false."),
            ('strategy = "magic"', "must be a value that --strategy takes."),
            ("grace = -1", "must be a value that --grace takes."),
            ("workers = ", "tfdist.toml must be a file in TOML."),
            ("workers = 0", "The number of workers must be 1 or more."),
            ("environment = 3", "[environment] in tfdist.toml must be a table"),
            ("[environment]\nA-B = 1", "must have a name of letters, digits and _."),
            ("[environment]\nA = true", "Put it in quotes."),
            ("[environment]\nTF_CONFIG = '{}'", "[environment] must not have TF_CONFIG."),
            ("[environment]\nTFDIST_TOKEN = 's3'", "must not have TFDIST_TOKEN."),
        ],
    )
    def test_what_a_file_must_not_have(self, folder, text, message):
        folder.write(text)
        told = folder.run(status=1)
        assert message in told
        assert "s3" not in told
        assert not folder.runs


class TestConfig:
    def test_writes_what_run_reads(self, folder):
        given = ["-n", "3", "--strategy", "multi_worker", "--max-restarts", "4/1h", "--drop-in"]
        given += ["--grace", "1.5", "--log-dir", 'a "b" é']
        folder.invoke("config", *given, "--env", 'MY_SETTING=a "quoted\\" = é')
        told = folder.run()
        told_options = told.partition("toml: ")[2].partition(", environment MY_SETTING")[0]
        assert told_options == (
            '--workers 3, --strategy multi_worker, --drop-in, --log-dir a "b" é, '
            "--max-restarts 4/1h, --grace 1.5"
        )
        assert len(folder.workers) == 3
        assert folder.workers[0].environment["MY_SETTING"] == 'a "quoted\\" = é'
        assert folder.runs[-1][1]["log_dir"] == Path('a "b" é')

    def test_keeps_a_file_that_is_there(self, folder):
        folder.write("workers = 2")
        assert "Received: a file of this name." in folder.invoke("config", "-n", "3", status=1)
        assert (folder.path / "tfdist.toml").read_text() == "workers = 2"
        folder.invoke("config", "-n", "3", "--force")
        assert tomllib.loads((folder.path / "tfdist.toml").read_text()) == {"workers": 3}

    @pytest.mark.parametrize(
        ("arguments", "status", "message"),
        [
            ([], 2, "Options must say what to write."),
            (["--hosts", "a,a"], 1, "must name each host once"),
            (["--hosts", "a:2,b", "-n", "2"], 1, "must equal the sum of the slots"),
            (["--elastic", "3:1"], 1, "the smaller first"),
            (["--max-restarts", "x"], 1, "`--max-restarts` must be"),
            (["--env", "A"], 2, "--env must be NAME=VALUE."),
            (["--env", "TFDIST_TOKEN=x"], 1, "must not have TFDIST_TOKEN"),
            (["-n", "2", "--to", "none/x.toml"], 1, "must be one that can be written"),
        ],
    )
    def test_wrong_use(self, folder, arguments, status, message):
        assert message in folder.invoke("config", *arguments, status=status)
        assert not list(folder.path.glob("*.toml"))

    @pytest.mark.parametrize(
        ("answers", "expected"),
        [
            ("\n\n\n", {"workers": 2}),
            (
                "a:2,b:2\nhorovod\nMY_NUMBER=1 MY_SETTING=x\n",
                {
                    "hosts": "a:2,b:2",
                    "strategy": "horovod",
                    "environment": {"MY_NUMBER": "1", "MY_SETTING": "x"},
                },
            ),
        ],
    )
    def test_asks_on_a_terminal(self, folder, answers, expected):
        """With the terminal of a user: Click's runner has none."""
        code = (
            "import os, pty, sys\n"
            f"sys.argv = ['tfdist', 'config']\n"
            "from tfdist.cli import main\n"
            "child, terminal = pty.fork()\n"
            "if not child: main()\n"
            f"os.write(terminal, {answers.encode()!r})\n"
            "try:\n"
            "    while os.read(terminal, 1000): pass\n"
            "except OSError: pass\n"
            "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        )
        subprocess.run([sys.executable, "-c", code], timeout=60, check=True)
        assert tomllib.loads((folder.path / "tfdist.toml").read_text()) == expected
