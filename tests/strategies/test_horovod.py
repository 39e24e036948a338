"""Horovod's launchers, ours and horovodrun, with real ranks: ends that are not happy."""

from __future__ import annotations

import http.client
import re
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import QUIET, finished, free_port, tfdist_run
from tfdist.errors import LaunchError, StrategyError
from tfdist.launch import Host, plan_workers
from tfdist.launch.horovod import rank_environments
from tfdist.launch.horovod_rendezvous import rendezvous
from tfdist.launch.plan import free_addresses
from tfdist.strategies.horovod.start import _check_own_name

LIMIT_S = 180
SCRIPT = """
import os, signal, sys, time
import keras, numpy as np, tfdist

class AtStep5(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if not tfdist.is_chief() and batch == 5:
            if sys.argv[1] == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if sys.argv[1] == "raises":
                raise ValueError("a bad row")
            if sys.argv[1] == "hangs":
                time.sleep(1000)

keras.utils.set_random_seed(1)
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
model.compile("sgd", "mse")
x = np.random.default_rng(0).normal(size=(641, 4)).astype("float32")
history = tfdist.fit(model, x, x[:, :1], seed=1, epochs=2, callbacks=[AtStep5()], verbose=2)
print("loss", *history.history["loss"], flush=True)
"""

cluster = [pytest.mark.cluster, pytest.mark.waits, pytest.mark.timeout(2 * LIMIT_S)]


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(SCRIPT))
    return str(path)


def run(command: list[str], environ: Mapping[str, str] | None = None) -> tuple[int, str]:
    return finished(command, LIMIT_S, environ)


def ranks(script: str, *arguments: str) -> list[str]:
    return tfdist_run(2, script, *arguments, options=["--strategy", "horovod"])


def losses(output: str) -> list[str]:
    return re.findall(r"loss ([\d.e-]+ [\d.e-]+)", output)


class TestPlan:
    pytestmark = pytest.mark.cluster  # of no processes, but of Horovod

    def test_every_rank_knows_its_place(self):
        hosts = [Host("127.0.0.1", 2), Host("localhost", 1)]
        first, _, last = rank_environments(hosts, 0, "127.0.0.1:4711")
        assert (first["HOROVOD_RANK"], first["HOROVOD_LOCAL_SIZE"]) == ("0", "2")
        assert (last["HOROVOD_RANK"], last["HOROVOD_LOCAL_RANK"]) == ("2", "0")
        assert last["HOROVOD_CROSS_RANK"] == "1"
        assert first["HOROVOD_GLOO_RENDEZVOUS_PORT"] == "4711"

    def test_ranks_are_not_given_tf_config_too(self):
        workers = plan_workers(("true",), workers=2, strategy="horovod", environ={})
        assert [worker.environment["HOROVOD_RANK"] for worker in workers] == ["0", "1"]
        assert not any("TF_CONFIG" in worker.environment for worker in workers)

    def test_a_host_that_cannot_be_reached_is_named(self):
        with pytest.raises(LaunchError, match="no-such-host"):
            rank_environments([Host("no-such-host.invalid", 1)], 0, "no-such-host.invalid:1")


class TestRanks:
    pytestmark = cluster

    @pytest.mark.oldest
    def test_horovodrun_trains_as_one_process(self, script):
        status, alone = run([sys.executable, script, "ends"])
        assert status == 0, alone
        horovodrun = [sys.executable, "-m", "horovod.runner.launch", "--gloo", "-np", "2"]
        status, theirs = run([*horovodrun, sys.executable, script, "ends"])
        assert status == 0, theirs
        assert "2 ranks in Horovod" in theirs
        expected = [float(x) for x in losses(alone)[0].split()]
        found = losses(theirs)
        assert len(found) == 2
        for line in found:
            assert [float(x) for x in line.split()] == pytest.approx(expected, rel=1e-5)

    def test_two_hosts(self, script):
        port = str(free_port())
        options = ["--hosts", "localhost:1,127.0.0.1:1", "--port", port]
        command = [sys.executable, "-m", "tfdist.cli", "run", "--strategy", "horovod", *options]
        nodes = [
            subprocess.Popen(
                [*command, "--node-rank", str(node), script, "ends"],
                env={**QUIET, "TFDIST_TOKEN": "a secret"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for node in range(2)
        ]
        try:
            outputs = [node.communicate(timeout=LIMIT_S)[0] for node in nodes]
        finally:
            for node in nodes:
                node.kill()
        assert [node.returncode for node in nodes] == [0, 0], outputs
        assert losses(outputs[0]) == losses(outputs[1]) != []

    @pytest.mark.full  # tests/faults kills one too
    def test_a_rank_that_dies_ends_the_others_and_is_named(self, script):
        status, output = run(ranks(script, "dies"))
        assert status == 128 + 9
        assert "worker 1 was ended by signal 9 (SIGKILL)" in output

    @pytest.mark.full  # tests/cli does so for workers
    def test_a_rank_that_fails_is_the_cause_that_is_shown(self, script):
        start = time.monotonic()
        status, output = run(ranks(script, "raises"))
        assert status == 1
        assert time.monotonic() - start < 60
        error = output[output.index("Error: ") :]
        assert "worker 1 ended with exit status 1" in error
        assert "ValueError: a bad row" in error

    @pytest.mark.full  # tests/watchdog
    def test_a_rank_that_does_not_come_is_reported_with_its_step(self, script):
        limits = {"TFDIST_STEP_TIMEOUT": "12", "HOROVOD_STALL_CHECK_TIME_SECONDS": "2"}
        status, output = run(ranks(script, "hangs"), limits)
        assert status == 75
        assert re.search(r"warning: rank 0 has waited \d+ s for step 7\.", output), output
        assert "rank 0 is in step 7" in output
        assert "rank 1 is after step 6" in output
        assert "Missing ranks" in output  # says Horovod, mended by `tfdist horovod build`

    def test_a_launcher_that_horovod_was_not_built_for(self, script):
        environ = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
        status, output = run([sys.executable, script, "ends"], environ)
        assert status == 1
        assert "1 connected of 2" in output
        assert "HOROVOD_WITH_MPI=1" in output


def test_a_scope_in_which_all_have_met_is_forgotten_whatever_others_did() -> None:
    pytest.importorskip("horovod")
    (address,) = free_addresses(1)
    first = {
        "HOROVOD_RANK": "0",
        "HOROVOD_SIZE": "2",
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1",
        "HOROVOD_GLOO_RENDEZVOUS_PORT": address.rpartition(":")[2],
    }

    def ask(method: str, path: str) -> int:
        server = http.client.HTTPConnection(address, timeout=20)
        server.request(method, f"/{path}", b"x" if method == "PUT" else None)
        status = server.getresponse().status
        server.close()
        return status

    with rendezvous(first, ()):
        for scope in ("global", "local_127.0.0.1", "cross_0"):
            assert [ask("PUT", f"{scope}/{rank}") for rank in "01"] == [200, 200]
        # Rank 0 is done with one scope, and with one that it has alone, before rank 1 is.
        for met in ("local_127.0.0.1/0", "cross_0/0", "local_127.0.0.1/1"):
            assert ask("DELETE", met) == 200
        assert [ask("GET", f"local_127.0.0.1/{rank}") for rank in "01"] == [404, 404]
        assert [ask("GET", f"global/{rank}") for rank in "01"] == [200, 200]


@pytest.mark.parametrize(
    ("interface", "address", "is_mended", "is_refused"),
    [
        ("eth0", "127.0.1.1", False, True),  # as Debian's /etc/hosts has it
        ("eth0", "127.0.1.1", True, False),
        ("eth0", "10.0.0.1", False, False),
        ("lo", "127.0.1.1", False, False),
    ],
)
def test_a_name_that_is_this_machine_s_alone(
    interface: str, address: str, is_mended: bool, is_refused: bool, monkeypatch: Any
) -> None:
    horovod = pytest.importorskip("horovod")
    monkeypatch.setenv("HOROVOD_GLOO_IFACE", interface)
    monkeypatch.setattr(socket, "gethostbyname", lambda name: address)
    monkeypatch.delattr(horovod, "keeps_to_interface", raising=False)
    if is_mended:
        monkeypatch.setattr(horovod, "keeps_to_interface", True, raising=False)
    context = pytest.raises(StrategyError, match="own name") if is_refused else nullcontext()
    with context:
        _check_own_name()
