"""Workers that are killed, and a run that is started again: the same bits."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import QUIET, finished, tfdist_run
from tfdist.errors import START_ME_AGAIN

LIMIT_S = 300
STEP = 10  # of 3 epochs of 8
TRAIN = """
import hashlib, json, os, signal, sys, time
import keras, numpy as np, tfdist
from tests.equivalence.cases import clipped_sgd, mlp, table

folder, step, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
pause = float(sys.argv[4]) if len(sys.argv) > 4 else 0.0
deaths = int(sys.argv[5]) if len(sys.argv) > 5 else 1
place = tfdist.init(seed=3).strategy.place
model = mlp(clipped_sgd())
every = 1000 if number == signal.SIGTERM else 1
markers = [os.path.join(folder, f"died-{i}") for i in range(deaths)]
died = next((path for path in markers if not os.path.exists(path)), folder)

class Dies(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        time.sleep(pause)
        last = place.worker_index == place.num_workers - 1
        # The step's checkpoint may have been made without it: then it fails at the next one.
        is_time = 0 < step <= int(model.optimizer.iterations)
        if last and is_time and not os.path.exists(died):
            open(died, "w").close()
            os.kill(os.getpid(), number)

history = tfdist.fit(
    model, *table(), batch_size=128, epochs=3, validation_data=table(101), verbose=0,
    callbacks=[keras.callbacks.EarlyStopping("loss", restore_best_weights=True), Dies()],
    checkpoint=tfdist.Checkpoint(os.path.join(folder, "checkpoints"), every=every),
)
variables = (*model.variables, *model.optimizer.variables)
state = b"".join(np.asarray(v).tobytes() for v in variables)
sums = [float(np.abs(v).sum()) for v in model.get_weights()]
print("RESULT", json.dumps([hashlib.sha256(state).hexdigest(), history.history, sums]))
"""

pytestmark = [pytest.mark.cluster, pytest.mark.waits, pytest.mark.timeout(4 * LIMIT_S)]


def results(printed: str) -> list[Any]:
    return [json.loads(text) for text in re.findall(r"RESULT (\[.*\])", printed)]


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("script") / "train.py"
    path.write_text(TRAIN)
    return path


@pytest.fixture(scope="module")
def never_stopped(
    script: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], list[Any]]:
    """Gives what a run that is never stopped prints, by strategy."""

    @functools.cache
    def run(strategy: str) -> list[Any]:
        folder = tmp_path_factory.mktemp(strategy)
        command = tfdist_run(2, script, folder, 0, 0, options=["--strategy", strategy])
        if strategy == "single":
            command = [sys.executable, str(script), str(folder), "0", "0"]
        status, printed = finished(command, LIMIT_S)
        assert status == 0, printed
        return results(printed)

    return run


def test_a_killed_run_that_is_started_again_ends_with_the_same_bits(
    script: Path, never_stopped: Callable[[str], list[Any]], tmp_path: Path
) -> None:
    expected = never_stopped("multi_worker")
    assert len(expected) == 2
    killed, alone = tmp_path / "killed", tmp_path / "alone"
    killed.mkdir()

    def run() -> tuple[int, str]:
        return finished(tfdist_run(2, script, killed, STEP, int(signal.SIGKILL)), LIMIT_S)

    status, printed = run()
    assert status == 128 + signal.SIGKILL, printed
    assert results(printed) == []
    shutil.copytree(killed, alone)
    status, printed = run()
    assert status == 0, printed
    assert results(printed) == expected

    # One process: the same but for the order of additions.
    status, printed = finished([sys.executable, str(script), str(alone), "0", "0"], LIMIT_S)
    assert status == 0, printed
    ((_, history, sums),) = results(printed)
    assert sums == pytest.approx(expected[0][2], rel=1e-4)
    for name, values in expected[0][1].items():
        assert history[name] == pytest.approx(values, rel=1e-4), name


@pytest.mark.full  # tests/faults terminates a worker
def test_sigterm_to_one_worker_saves_on_all_and_asks_to_be_started_again(
    script: Path, never_stopped: Callable[[str], list[Any]], tmp_path: Path
) -> None:
    arguments = script, tmp_path, STEP, int(signal.SIGTERM)
    options = ["--strategy", "horovod"]
    status, printed = finished(tfdist_run(2, *arguments, options=options), LIMIT_S)
    assert status == START_ME_AGAIN, printed
    # The signal came when a step had been made; the next one told the chief, and was made.
    assert "worker 0 │ tfdist: saved after step 3 of epoch 2" in printed
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [
        "epoch-00001-step-0000003"
    ]
    status, printed = finished(tfdist_run(2, *arguments, options=options), LIMIT_S)
    assert status == 0, printed
    found, other = results(printed)
    assert found == other
    (_, history, sums), _ = never_stopped("multi_worker")
    assert found[2] == pytest.approx(sums, rel=1e-6)
    for name, values in history.items():
        assert found[1][name] == pytest.approx(values, rel=1e-6), name


@pytest.mark.full  # test_launch.py does it with scripts that do not train
def test_an_elastic_run_goes_on_without_a_worker_that_fails_twice(
    script: Path, never_stopped: Callable[[str], list[Any]], tmp_path: Path
) -> None:
    arguments = script, tmp_path, STEP, int(signal.SIGKILL), 0, 2
    command = tfdist_run(2, *arguments)
    command[command.index("-n") : command.index("-n") + 2] = ["--elastic", "1:2"]
    status, printed = finished(command, LIMIT_S)
    assert status == 0, printed
    assert "All are started again, now 1 in all (2 of 3)." in printed
    assert re.search(
        r"2 restarts:\n  1\. \S+, after step [23] of epoch 2: worker 1 was ended by signal 9"
        r".* The next step was made \d+\.\d s later\.",
        printed,
    )
    ((_, history, sums),) = results(printed)
    (_, expected, expected_sums), _ = never_stopped("multi_worker")
    assert sums == pytest.approx(expected_sums, rel=1e-4)
    for name, values in expected.items():
        assert history[name] == pytest.approx(values, rel=1e-4), name


SERVED = """
import os, signal, sys
import keras, tfdist
from tests.equivalence.cases import clipped_sgd, mlp, table

folder = sys.argv[1]
tfdist.init("parameter_server", seed=3)
model = mlp(clipped_sgd())
signalled = os.path.join(folder, "signalled")

class Signals(keras.callbacks.Callback):
    made = 0
    def on_train_batch_end(self, batch, logs=None):
        self.made += 1
        if self.made == 10 and not os.path.exists(signalled):
            open(signalled, "w").close()
            os.kill(os.getpid(), signal.SIGTERM)

history = tfdist.fit(
    model, *table(), batch_size=128, epochs=3, verbose=0, callbacks=[Signals()],
    checkpoint=os.path.join(folder, "checkpoints"),
)
print("MADE", int(model.optimizer.iterations), len(history.history["loss"]))
"""


@pytest.mark.full
def test_sigterm_saves_asynchronous_training_between_steps(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SERVED)
    options = ["--ps", "1", "--max-restarts", "1"]
    status, printed = finished(tfdist_run(1, script, tmp_path, options=options), LIMIT_S)
    assert status == 0, printed
    assert "tfdist: saved after step 2 of epoch 2" in printed
    assert "All are started again (1 of 1)" in printed
    assert "MADE 24 3" in printed  # none is lost, none is made twice


@pytest.mark.parametrize(
    "launched",
    [
        pytest.param(False, id="python", marks=pytest.mark.full),
        pytest.param(True, id="tfdist run"),
    ],
)  # python alone: tests/examples
@pytest.mark.full  # tests/examples: checkpoint.py
def test_sigterm_saves_a_single_process(
    launched: bool, script: Path, never_stopped: Callable[[str], list[Any]], tmp_path: Path
) -> None:
    arguments = [str(script), str(tmp_path), str(STEP), "0", "0.2"]
    start = ["-m", "tfdist.cli", "run", "--grace", "60"] if launched else []
    process = subprocess.Popen(
        [sys.executable, *start, *arguments],
        env=QUIET,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        await_file(tmp_path / "died-0", process)
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()
    assert process.returncode == START_ME_AGAIN, printed
    assert "tfdist: saved after step" in printed
    status, printed = finished([sys.executable, *arguments[:-1]], LIMIT_S)
    assert status == 0, printed
    assert results(printed) == never_stopped("single")


def await_file(path: Path, *processes: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        for process in processes:
            assert process.poll() is None, process.stdout and process.stdout.read()
        time.sleep(0.05)


class Machines:
    """Two network namespaces, each with an address of its own, joined by a bridge."""

    def __init__(self) -> None:
        self._names = [f"tfd{os.getpid() % 100000}-{i}" for i in range(2)]
        self._bridge = f"tfdb{os.getpid() % 100000}"
        self.addresses = ["10.77.0.1", "10.77.0.2"]

    def make(self) -> None:
        ip("link", "add", self._bridge, "type", "bridge")
        ip("link", "set", self._bridge, "up")
        for i, name in enumerate(self._names):
            ip("netns", "add", name)
            ip("link", "add", f"v{name}", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", f"v{name}", "master", self._bridge, "up")
            ip("-n", name, "addr", "add", f"{self.addresses[i]}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")

    def remove(self) -> None:
        for name in self._names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", self._bridge], check=False, capture_output=True)

    def within(self, machine: int) -> list[str]:
        """Gives what goes before a command that runs on a machine."""
        return ["ip", "netns", "exec", self._names[machine]]

    def cable(self, machine: int, state: str) -> None:
        """Pulls a machine's cable, or plugs it in."""
        ip("link", "set", f"v{self._names[machine]}", state)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=20)


@pytest.fixture
def machines() -> Iterator[Machines]:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need the program `ip` (package iproute2)")
    made = Machines()
    try:
        try:
            made.make()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
        yield made
    finally:
        made.remove()


@pytest.mark.full  # test_launch.py does it with scripts that do not train
def test_a_host_that_is_cut_off_and_comes_back(
    machines: Machines,
    script: Path,
    never_stopped: Callable[[str], list[Any]],
    tmp_path: Path,
) -> None:
    hosts = ",".join(machines.addresses)
    logs = [tmp_path / f"node-{i}.txt" for i in range(2)]
    launchers = []
    for rank in range(2):
        options = ["--hosts", hosts, "--node-rank", str(rank), "--max-restarts", "2"]
        command = tfdist_run(2, script, tmp_path, STEP, 0, 0.3, options=options)
        with logs[rank].open("w") as log:
            launchers.append(
                subprocess.Popen(
                    [*machines.within(rank), *command],
                    env={**QUIET, "TFDIST_TOKEN": "a secret"},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
    try:
        await_file(tmp_path / "died-0", *launchers)
        machines.cable(1, "down")
        deadline = time.monotonic() + LIMIT_S
        while not all("All are started again on all hosts" in log.read_text() for log in logs):
            assert time.monotonic() < deadline, [log.read_text() for log in logs]
            time.sleep(0.2)
        machines.cable(1, "up")
        statuses = [launcher.wait(LIMIT_S) for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.kill()
    printed = [log.read_text() for log in logs]
    assert statuses == [0, 0], printed
    assert "1 restart:" in printed[0]
    assert [*results(printed[0]), *results(printed[1])] == never_stopped("multi_worker")
