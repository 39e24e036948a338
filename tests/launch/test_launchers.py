"""Processes that something else has started, with the variables that it sets."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.examples.program import EXAMPLES
from tests.jobs import QUIET, free_port

pytestmark = [pytest.mark.cluster, pytest.mark.waits, pytest.mark.timeout(240)]
LIMIT_S = 120
LAUNCHER = [sys.executable, "-m", "tfdist.cli", "run"]

SCRIPT = """
import tfdist

tfdist.init()
import json, os
import keras, numpy as np

keras.utils.set_random_seed(1)
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
model.compile("sgd", "mse")
x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
if json.loads(os.environ.get("TF_CONFIG", "{}")).get("task", {}).get("type") == "evaluator":
    print("alone", tfdist.evaluate(model, x, x[:, :1], verbose=0))
history = tfdist.fit(model, x, x[:, :1], seed=1, verbose=2)
print("chief" if tfdist.is_chief() else "other", *history.history["loss"])
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return str(path)


def together(starts: Sequence[tuple[Sequence[str], Mapping[str, str]]]) -> list[str]:
    """Runs commands side by side, each with its variables, and gives what they printed."""
    processes = [
        subprocess.Popen(
            command,
            env={**QUIET, **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command, environ in starts
    ]
    try:
        printed = [process.communicate(timeout=LIMIT_S)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(starts), printed
    return printed


def trained_together(chief: str, other: str) -> None:
    """Checks that two processes were one run, with one chief."""
    assert "2 replicas" in chief
    assert "2 replicas" not in other
    (loss,) = re.findall(r"chief ([\d.]+)", chief)
    assert re.findall(r"other ([\d.]+)", other) == [loss]


@pytest.mark.full  # tests/cluster reads what they are given
def test_tasks_of_srun_become_ranks_of_horovod(script: str) -> None:
    environ = {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "TFDIST_PORT": str(free_port()),
    }
    command = [*LAUNCHER, "--strategy", "horovod", script]
    chief, other = together([(command, {**environ, "SLURM_PROCID": str(i)}) for i in range(2)])
    trained_together(chief, other)
    assert "worker 0 │" in chief
    assert "worker 1 │" in other


@pytest.mark.full  # tests/cluster reads what they are given
def test_replicas_of_a_tfjob(script: str) -> None:
    port = free_port()
    cluster = {"chief": [f"127.0.0.1:{port}"], "worker": [f"127.0.0.1:{port + 1}"]}
    tasks = [{"type": t, "index": 0} for t in ("chief", "worker", "evaluator")]
    configs = [json.dumps({"cluster": cluster, "task": task}) for task in tasks]
    chief, other, evaluator = together(
        [([*LAUNCHER, script], {"TF_CONFIG": config}) for config in configs]
    )
    trained_together(chief, other)
    assert "evaluator 0 │ alone" in evaluator
    assert "evaluator 0 has no part in training" in evaluator
    assert "Epoch" not in evaluator


def test_a_function_that_a_scheduler_sends(tmp_path: Path) -> None:
    # What Ray Train, PySpark's barrier mode and Dask do.
    done = subprocess.run(
        [sys.executable, EXAMPLES / "own_scheduler.py"],
        cwd=tmp_path,
        env=QUIET,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (accuracies,) = re.findall(r"accuracy on every worker: ([\d.]+)%, ([\d.]+)%", done.stdout)
    assert accuracies[0] == accuracies[1]
    assert float(accuracies[0]) > 85
    assert done.stdout.count("Epoch 1/5") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["digits.weights.h5"]


@pytest.mark.full
def test_a_strategy_that_a_scheduler_has_made() -> None:
    # As spark-tensorflow-distributor calls a function: in the scope of a strategy of two.
    port = free_port()
    cluster = {"worker": [f"127.0.0.1:{port + i}" for i in range(2)]}
    code = (
        "import json, os, sys, tensorflow as tf\n"
        "config = json.loads(os.environ['TF_CONFIG'])\n"
        "with tf.distribute.MultiWorkerMirroredStrategy().scope():\n"
        "    import tfdist\n"
        "    try: tfdist.init()\n"
        "    except RuntimeError as error: print(error)\n"
        "    session = tfdist.init(strategy=tf.distribute.get_strategy())\n"
        "    print(session.strategy.place.num_workers, 'workers')\n"
    )
    starts = [
        (
            [sys.executable, "-c", code],
            {
                "TF_CONFIG": json.dumps(
                    {"cluster": cluster, "task": {"type": "worker", "index": i}}
                )
            },
        )
        for i in range(2)
    ]
    for printed in together(starts):
        assert "use_custom_strategy=True" in printed
        assert "2 workers" in printed


OF_ANOTHER_PACKAGE = """
from tfdist.strategies.multi_worker import MultiWorker

class Mine(MultiWorker):
    name = "mine"

    @classmethod
    def chosen_by(cls, cluster):
        return None
"""


def test_a_strategy_of_another_package_is_launched_by_its_name(
    script: str, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(OF_ANOTHER_PACKAGE)
    installed = tmp_path / "mine-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[tfdist.strategies]\nmine = mine:Mine\n")
    path = {"PYTHONPATH": str(tmp_path)}
    command = [*LAUNCHER, "-n", "2", "--strategy", "mine", script]
    (printed,) = together([(command, path)])
    assert "tfdist: mine (as asked for): 2 replicas" in printed, printed
    unknown = subprocess.run(
        [*LAUNCHER, "--strategy", "mine", script], capture_output=True, text=True, check=False
    )
    assert unknown.returncode == 2
    assert "'mine' is not one of 'auto', 'single'" in unknown.stderr
