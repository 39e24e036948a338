"""Parameter servers: where variables go, how processes start, and what survives a loss."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import tfdist
from tests.jobs import QUIET, finished, tfdist_run
from tfdist.cluster import CHIEF, PS, WORKER, Cluster
from tfdist.errors import LaunchError
from tfdist.launch import parse_hosts, plan_workers
from tfdist.launch.plan import free_addresses, server_clusters
from tfdist.strategies.parameter_server.asynchronous import window
from tfdist.strategies.parameter_server.placement import Size, VariableSlice, place
from tfdist.strategies.parameter_server.servers import worker_devices
from tfdist.training.callbacks import look_between_steps

LIMIT_S = 240
SCRIPT = """
import json, os, pathlib, sys
import keras, numpy as np, psutil, tfdist

keras.utils.set_random_seed(1)


class Constant(keras.Model):
    # The gradient is 1 wherever the weight is: the weight counts the updates.
    def __init__(self):
        super().__init__()
        self.w = self.add_weight(shape=(4,), initializer="zeros", name="w")

    def call(self, x):
        return x * 0 + self.w

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return keras.ops.sum(self.w)


class Loss(keras.callbacks.Callback):
    # Kills a process of the run, once, at the beginning of the second epoch.
    def __init__(self, task, marker):
        super().__init__()
        self.task, self.marker = task, pathlib.Path(marker)

    def on_train_batch_end(self, batch, logs=None):
        if batch == 20 and self.params.get("epoch") != 0 and not self.marker.exists():
            self.marker.touch()
            for process in psutil.Process(os.getppid()).children():
                task = json.loads(process.environ()["TF_CONFIG"])["task"]
                if f"{task['type']} {task['index']}" == self.task:
                    process.kill()

    def on_epoch_begin(self, epoch, logs=None):
        self.params["epoch"] = epoch


how, task, folder = sys.argv[1:]
strategy = tfdist.ParameterServer(synchronous=how == "synchronous")
model = Constant()
model.build((None, 4))
model.compile(keras.optimizers.SGD(1.0))
history = tfdist.fit(
    model,
    np.ones((100, 4), "float32"),
    batch_size=2,
    epochs=4,
    verbose=0,
    strategy=strategy,
    callbacks=[
        keras.callbacks.BackupAndRestore(folder + "/backup"),
        Loss(task, folder + "/lost"),
    ],
)
print("RESULT", json.dumps({
    "w": model.w.numpy().tolist(),
    "iterations": int(model.optimizer.iterations.numpy()),
    "epochs": len(history.history["loss"]),
}), flush=True)
"""


class TestPlacement:
    pytestmark = pytest.mark.quick

    def test_bytes_are_balanced(self):
        rng = np.random.default_rng(0)
        sizes = [Size(1, int(b), False) for b in rng.integers(1, 10_000, size=200)]
        load = [0, 0, 0]
        for size, (part,) in zip(sizes, place(sizes, 3, 1), strict=True):
            load[part.server] += size.bytes
        assert max(load) - min(load) <= 10_000

    def test_large_variables_are_split_by_rows(self):
        parts = place([Size(10, 1000, True), Size(3, 90, True)], 3, 300)
        assert parts[0] == (
            VariableSlice(0, 0, 3),
            VariableSlice(1, 3, 6),
            VariableSlice(2, 6, 10),
        )
        assert len(parts[1]) == 1

    def test_what_cannot_be_split_stays_whole(self):
        ((part,),) = place([Size(10, 1000, False)], 3, 1)
        assert (part.begin, part.end) == (0, 10)

    def test_no_part_is_without_rows(self):
        ((first, second),) = place([Size(2, 1_000_000, True)], 8, 1)
        assert (first.begin, first.end, second.begin, second.end) == (0, 1, 1, 2)


@pytest.mark.quick
@pytest.mark.parametrize("workers", [1, 2, 3, 8])
@pytest.mark.parametrize("updates", [1, 2, 5])
def test_window_is_the_largest_that_keeps_the_bound(workers, updates):
    def bound(window):
        # Those under way when a step began, and those that began while it was the oldest.
        return updates * (min(workers - 1, window - 1) + window - 1)

    for most in range(30):
        chosen = window(most, workers, updates)
        assert bound(chosen) <= most or chosen == 1
        assert bound(chosen + 1) > most


@pytest.mark.quick
class TestPlan:
    def test_the_chief_comes_first_and_the_rest_serves(self):
        planned = plan_workers(["train"], workers=2, servers=2, environ={})
        assert [w.task for w in planned] == ["chief", "ps 0", "ps 1", "worker 0", "worker 1"]
        assert [w.serves for w in planned] == [False, True, True, True, True]
        assert [w.is_replaceable for w in planned] == [False, False, False, True, True]
        clusters = [Cluster.from_environment(w.environment) for w in planned]
        assert [c.task for c in clusters] == [w.task for w in planned]
        assert len({c.to_tf_config().partition('"task"')[0] for c in clusters}) == 1
        addresses = [a for job in (CHIEF, WORKER, PS) for a in clusters[0].jobs[job]]
        assert len(set(addresses)) == 5

    def test_only_workers_keep_the_gpus(self):
        planned = plan_workers(
            ["x"], workers=2, servers=1, environ={"CUDA_VISIBLE_DEVICES": "0,1"}
        )
        gpus = [w.environment["CUDA_VISIBLE_DEVICES"] for w in planned]
        assert gpus == ["-1", "-1", "0", "1"]

    def test_a_worker_computes_on_its_first_gpu(self):
        # As TensorFlow names the devices of a cluster, in any order.
        task = "/job:worker/replica:0/task:{}/device:{}:{}".format
        chief = "/job:chief/replica:0/task:0/device:GPU:0"
        gpus = [task(10, "GPU", 0), task(1, "GPU", 1), task(1, "GPU", 0), chief]
        expected = [task(0, "CPU", 0), task(1, "GPU", 0), task(2, "CPU", 0)]
        assert list(worker_devices(3, gpus)) == expected

    def test_servers_go_to_the_hosts_in_turn(self):
        clusters = server_clusters(parse_hosts("a:2,b"), 3, 3, 100)
        jobs = clusters[0].jobs
        assert jobs[CHIEF] == ("a:103",)
        assert jobs[WORKER] == ("a:100", "a:101", "b:102")
        assert jobs[PS] == ("a:104", "b:105", "a:106")

    def test_each_host_starts_its_own(self):
        def tasks(node):
            hosts = parse_hosts("localhost:2,127.0.0.1")
            planned = plan_workers(
                ["x"], hosts=hosts, node_rank=node, servers=2, port=23000, environ={}
            )
            return [w.task for w in planned]

        assert tasks(0) == ["chief", "ps 0", "worker 0", "worker 1"]
        assert tasks(1) == ["ps 1", "worker 2"]

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"strategy": "parameter_server"}, "Add --ps 1"),
            ({"servers": -1}, "--ps=-1"),
            ({"servers": 1, "strategy": "horovod"}, "has no parameter servers"),
        ],
    )
    def test_contradictions_are_refused(self, options, said):
        with pytest.raises(LaunchError, match=re.escape(said)):
            plan_workers(["x"], workers=2, environ={}, **options)


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return str(path)


def result(printed: str) -> dict:
    found: dict = json.loads(re.search(r"RESULT (\{.*\})", printed)[1])
    return found


@pytest.mark.cluster
@pytest.mark.waits
@pytest.mark.timeout(LIMIT_S + 60)
class TestLosses:
    @pytest.mark.oldest
    def test_a_killed_worker_costs_no_update(self, script, tmp_path):
        command = tfdist_run(
            2, script, "asynchronous", "worker 1", tmp_path, options=["--ps", "1"]
        )
        status, printed = finished(command, LIMIT_S)
        assert status == 0, printed
        assert "worker 1 was ended by signal 9 (SIGKILL)" in printed
        assert "It is started again (1 of 3)" in printed
        assert result(printed) == {"w": [-200.0] * 4, "iterations": 200, "epochs": 4}

    @pytest.mark.full  # tests/faults kills one too
    def test_after_a_killed_server_training_goes_on_from_the_backup(self, script, tmp_path):
        command = tfdist_run(1, script, "asynchronous", "ps 0", tmp_path, options=["--ps", "1"])
        status, printed = finished(command, LIMIT_S)
        assert status == 0, printed
        assert "ps 0 was ended by signal 9 (SIGKILL)" in printed
        assert "All are started again (1 of 3)" in printed
        # The first epoch was backed up, three were trained by the second attempt.
        assert result(printed) == {"w": [-200.0] * 4, "iterations": 200, "epochs": 3}

    @pytest.mark.full  # tests/faults kills one too
    def test_a_killed_worker_of_synchronous_training(self, script, tmp_path):
        command = tfdist_run(
            2, script, "synchronous", "worker 0", tmp_path, options=["--ps", "1"]
        )
        status, printed = finished(command, LIMIT_S)
        assert status == 0, printed
        assert "started again (1 of 3)" in printed
        assert result(printed) == {"w": [-200.0] * 4, "iterations": 200, "epochs": 3}

    @pytest.mark.full  # tests/launch says what the launcher says of any process
    def test_without_restarts_the_cause_is_named(self, script, tmp_path):
        options = ["--ps", "1", "--max-restarts", "0"]
        command = tfdist_run(1, script, "asynchronous", "ps 0", tmp_path, options=options)
        status, printed = finished(command, LIMIT_S)
        assert status == 128 + signal.SIGKILL, printed
        assert "Error: ps 0 was ended by signal 9 (SIGKILL)" in printed


def environment(jobs: dict, job: str, index: int) -> dict[str, str]:
    return {
        **QUIET,
        "TF_CONFIG": Cluster(jobs, job, index).to_tf_config(),
        "TFDIST_START_TIMEOUT": "5",
    }


def begun(jobs: dict, job: str, index: int) -> subprocess.CompletedProcess[str]:
    """Begins a session in one process of a cluster of which the others never come."""
    return subprocess.run(
        [sys.executable, "-c", "import tfdist; tfdist.init()"],
        env=environment(jobs, job, index),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.cluster
@pytest.mark.waits
class TestClusters:
    @pytest.mark.oldest
    def test_processes_of_any_cluster_serve_until_the_chief_has_ended(self, tmp_path):
        addresses = free_addresses(3)
        jobs = {CHIEF: addresses[:1], WORKER: addresses[1:2], PS: addresses[2:]}
        script = tmp_path / "train.py"
        script.write_text(
            "import tfdist\ntfdist.init(seed=1)\nimport keras, numpy as np\n"
            "model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])\n"
            "model.compile('sgd', 'mse')\n"
            "tfdist.fit(model, np.ones((8, 2)), np.ones((8, 1)), verbose=2)\n"
        )
        # Started before the chief, these wait for it; the limit is for its start.
        tasks = [(WORKER, 0), (PS, 0), (CHIEF, 0)]
        started = [
            subprocess.Popen(
                [sys.executable, str(script)],
                env={**environment(jobs, *task), "TFDIST_START_TIMEOUT": "60"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for task in tasks
        ]
        try:
            printed = [process.communicate(timeout=120)[0] for process in reversed(started)]
            assert [process.returncode for process in started] == [0, 0, 0], printed
            assert "parameter_server (1 workers and 1 servers in TF_CONFIG)" in printed[0]
        finally:
            for process in started:
                process.kill()

    def test_a_worker_that_never_comes_is_named(self):
        addresses = free_addresses(4)
        jobs = {CHIEF: addresses[:1], WORKER: addresses[1:3], PS: addresses[3:]}
        done = begun(jobs, CHIEF, 0)
        assert done.returncode == 1
        refused = "(Connection refused)"
        assert f"no answer from worker 0 at {addresses[1]} {refused}, worker 1" in done.stderr
        assert f"ps 0 at {addresses[3]}" in done.stderr

    @pytest.mark.full
    def test_a_chief_that_never_comes_is_named(self):
        addresses = free_addresses(3)
        jobs = {CHIEF: addresses[:1], WORKER: addresses[1:2], PS: addresses[2:]}
        done = begun(jobs, PS, 0)
        assert done.returncode == 1
        assert f"no answer from chief at {addresses[0]}" in done.stderr

    @pytest.mark.full
    def test_a_cluster_without_workers_is_refused(self):
        jobs = {CHIEF: ("127.0.0.1:1",), PS: ("127.0.0.1:2",)}
        done = begun(jobs, CHIEF, 0)
        assert "the cluster has no worker" in done.stderr


class Watcher(keras.callbacks.ModelCheckpoint):
    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        print(batch)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("callback", "looks"),
    [
        (keras.callbacks.EarlyStopping(), False),
        (keras.callbacks.ModelCheckpoint("a.keras"), False),
        (keras.callbacks.ModelCheckpoint("a.keras", save_freq=10), True),
        (keras.callbacks.LambdaCallback(on_epoch_end=print), False),
        (keras.callbacks.LambdaCallback(on_train_batch_end=print), True),
        (tfdist.LearningRateWarmup(1), True),
        (keras.callbacks.TerminateOnNaN(), True),
        (Watcher("a.keras"), True),
    ],
)
def test_callbacks_that_look_between_steps(callback, looks):
    assert look_between_steps([callback]) is looks
    assert look_between_steps(keras.callbacks.CallbackList([callback])) is looks
