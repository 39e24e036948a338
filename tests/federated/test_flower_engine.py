"""Rounds on Flower's own server and two nodes, each message in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import psutil
import pytest

import tfdist
from tests.federated.flower_standin import IS_THERE
from tests.jobs import ROOT, free_port

pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not IS_THERE, reason="needs Flower: make test-flower"),
]
LIMIT_S = 900
SERVER = """
import keras, numpy as np, tfdist.flower
from digits.task import model_fn

def save(model, history):
    np.savez({path!r}, *model.get_weights(), loss=history.history["loss"])

app = tfdist.flower.server_app(
    model_fn,
    federated=tfdist.FedAvg(local_steps=3, server_optimizer=keras.optimizers.Adam(0.03)),
    rounds=2, batch_size=16, num_clients=2, seed=1, on_end=save,
)
"""


class Started:
    """Processes of Flower, which leave children behind when they are asked to end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        home = folder / "home"
        home.mkdir()
        self.environ = {
            **os.environ,
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "PYTHONPATH": os.environ["PYTHONPATH"],
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def start(self, *command: str) -> None:
        log = (self._folder / f"{command[0]}-{len(self._processes)}.log").open("wb")
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=self.environ, start_new_session=True
        )
        self._processes.append(process)

    def logs(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self._folder.glob("*.log")))

    def end(self) -> None:
        tree = [psutil.Process(p.pid) for p in self._processes if p.poll() is None]
        tree += [child for process in tree for child in process.children(recursive=True)]
        for process in tree:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(tree, 10)
        for started in self._processes:
            started.wait()


@pytest.fixture
def flower(tmp_path: Path) -> Iterator[Started]:
    started = Started(tmp_path)
    yield started
    started.end()


def test_two_nodes_train_as_fit_does(flower: Started, tmp_path: Path) -> None:
    port = free_port()
    address = f"127.0.0.1:{port}"
    app, weights = tmp_path / "app", tmp_path / "weights.npz"
    subprocess.run(["cp", "-r", str(ROOT / "examples/flower_app"), str(app)], check=True)
    (app / "digits/server_app.py").write_text(SERVER.format(path=str(weights)))
    config = f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{address}"\n'
    (tmp_path / "home" / "config.toml").write_text(config + "insecure = true\n")
    flower.start(
        "flower-superlink", "--insecure", "--disable-runtime-dependency-installation",
        "--port", str(port),
    )  # fmt: skip
    wait(lambda: "startup complete" in flower.logs(), flower)
    for partition in range(2):
        flower.start(
            "flower-supernode", "--insecure", "--superlink", address,
            "--port", str(port + 1 + partition),
            "--node-config", f"partition-id={partition} num-partitions=2",
        )  # fmt: skip
    flower.start("flwr", "run", str(app), "here", "--stream")
    wait(weights.exists, flower)
    time.sleep(1)
    with np.load(weights) as saved:
        ours = [saved[name] for name in saved.files if name != "loss"]
        losses = saved["loss"]
    theirs, expected = in_one_process()
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def wait(ready: Callable[[], bool], flower: Started) -> None:
    end = time.monotonic() + LIMIT_S
    while not ready():
        assert time.monotonic() < end, flower.logs()
        time.sleep(1)


def in_one_process() -> tuple[list[Any], list[float]]:
    sys.path.insert(0, str(ROOT / "examples/flower_app"))
    try:
        from digits import task
    finally:
        sys.path.pop(0)
    x, _, y, _ = task.digits()
    ids = task.node_of(y, 2)
    order = np.argsort(ids, kind="stable")
    model = task.model_fn()
    averaging = tfdist.FedAvg(
        local_steps=3, server_optimizer=keras.optimizers.Adam(0.03), clients=ids[order]
    )
    history = tfdist.fit(
        model, x[order], y[order], batch_size=16, epochs=2, seed=1, verbose=0,
        federated=averaging,
    )  # fmt: skip
    return model.get_weights(), history.history["loss"]
