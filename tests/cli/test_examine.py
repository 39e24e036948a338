"""`tfdist recommend`, `tfdist estimate` and `tfdist run --explain`, as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

LIMIT_S = 240
HEAD = """
import keras
import numpy as np

x, y = np.random.rand(64, 20), np.random.randint(0, 3, 64)
model = keras.Sequential([keras.Input((20,)), keras.layers.Dense(16), keras.layers.Dense(3)])
"""
COMPILED = HEAD + "model.compile('adam', keras.losses.SparseCategoricalCrossentropy(True))\n"
TRAINS = COMPILED + "model.fit(x, y, batch_size=16)\nprint('the script has trained')\n"
PARAMETERS = 20 * 16 + 16 + 16 * 3 + 3


@pytest.fixture
def tfdist(tmp_path):
    """Runs the command in a folder of its own, which keeps what it measures there."""
    ours = ("TF_", "SLURM_", "TFDIST_", "OMP_", "CUDA_", "KERAS_")
    environ = {n: v for n, v in os.environ.items() if not n.startswith(ours)}
    environ["XDG_CACHE_HOME"] = str(tmp_path / "cache")

    def run(*arguments: str, script: str = TRAINS) -> subprocess.CompletedProcess:
        (tmp_path / "train.py").write_text(script)
        return subprocess.run(
            [sys.executable, "-m", "tfdist.cli", *arguments],
            cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=LIMIT_S,
        )  # fmt: skip

    return run


def error_of(result: subprocess.CompletedProcess) -> str:
    """The one line that says what is wrong."""
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, result.stderr
    assert "Traceback" not in result.stderr or "raised" in errors[0]
    assert not result.stdout
    return errors[0]


@pytest.mark.full
def test_run_explain_starts_no_worker_and_says_what_to_run(tfdist):
    result = tfdist("run", "-n", "2", "--explain", "train.py")
    assert result.returncode == 0, result.stderr
    assert f"{PARAMETERS} parameters" in result.stdout
    rows = {line.split("  ")[0]: line.split() for line in result.stdout.splitlines() if line}
    assert rows["multi_worker"][1] == "2"
    assert "Recommended: " in result.stdout
    assert "the script has trained" not in result.stdout + result.stderr


@pytest.mark.full
def test_recommend_prints_json_alone_on_its_output(tfdist):
    script = "print('noise')\n" + TRAINS
    result = tfdist("recommend", "--json", "--no-measure", "-n", "2", "train.py", script=script)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["model"]["parameters"] == PARAMETERS
    assert "noise" in result.stderr


@pytest.mark.full
def test_estimate_of_a_saved_model(tfdist, tmp_path):
    saved = tfdist("recommend", "train.py", script=COMPILED + "model.save('model.keras')\n")
    assert "and no `fit`" in error_of(saved)
    result = tfdist("estimate", "--json", "-n", "2", "-b", "16", "model.keras")
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)["rows"]
    whole = [row for row in rows if row["replicas"] == 1]
    assert whole[0]["memory"]["weights"] == 4 * PARAMETERS
    assert whole[0]["memory"]["optimizer"] == pytest.approx(2 * 4 * PARAMETERS, abs=64)


@pytest.mark.full
@pytest.mark.parametrize(
    ("script", "message"),
    [("print(1)", "ended without. Found: no model."),
     (HEAD.replace("keras.Input((20,)), ", "") + "model.fit(x, y)", "not compiled"),
     (HEAD.replace("keras.Input((20,)), ", ""), "and no `fit`"),
     ("raise OSError('no data here')", "raised OSError at line 1: no data here"),
     ("import sys\nsys.exit('usage: train.py DATA')", "usage: train.py DATA")],
)  # fmt: skip
@pytest.mark.parametrize("command", [["recommend"], ["run", "--explain"]])
def test_a_script_that_does_not_train_gets_one_line(tfdist, command, script, message):
    result = tfdist(*command, "train.py", script=script)
    assert result.returncode == 1
    assert message in error_of(result)


@pytest.mark.quick
class TestWithoutTensorFlow:
    """What is known without TensorFlow comes at once."""

    @pytest.mark.parametrize("command", ["recommend", "estimate"])
    @pytest.mark.parametrize(
        ("target", "message"),
        [("missing.py", "missing.py"), ("missing.keras", "Check the path"),
         ("broken.py", "SyntaxError")],
    )  # fmt: skip
    def test_a_target_that_is_not_there(self, command, target, message, tmp_path, monkeypatch):
        from click.testing import CliRunner

        from tfdist import cli

        monkeypatch.chdir(tmp_path)
        (tmp_path / "broken.py").write_text("x = = 1\n")
        monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("TensorFlow starts"))
        result = CliRunner().invoke(cli.main, [command, target])
        assert result.exit_code in (1, 2)
        assert message in result.output
