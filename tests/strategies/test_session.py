"""Beginning a session: too late, alone, with a port taken, and the line that describes it."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfdist
from tests.jobs import QUIET, ROOT
from tfdist import strategies
from tfdist.cluster import Cluster, rendezvous
from tfdist.cluster.rendezvous import meet, wait_until_resolved
from tfdist.errors import StrategyError
from tfdist.strategies.base import Place, Strategy
from tfdist.strategies.session import Session
from tfdist.strategies.single import Single

pytestmark = pytest.mark.quick


@pytest.fixture
def addresses() -> Iterator[tuple[str, str]]:
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        return tuple(f"127.0.0.1:{s.getsockname()[1]}" for s in (one, two))


def worker(addresses: tuple[str, ...], index: int) -> Cluster:
    return Cluster({"worker": addresses}, "worker", index, "TF_CONFIG")


def test_workers_meet(addresses: tuple[str, str]) -> None:
    other = threading.Thread(target=meet, args=(worker(addresses, 1), 20), daemon=True)
    other.start()
    meet(worker(addresses, 0), 20)
    other.join(20)
    assert not other.is_alive()


def test_a_missing_worker_is_named(addresses: tuple[str, str]) -> None:
    with pytest.raises(StrategyError, match=f"no answer from worker 1 at {addresses[1]}"):
        meet(worker(addresses, 0), 0.3)


def test_a_name_that_does_not_resolve_is_named(capfd: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(rendezvous, "_NOTICE_S", 0.2)
    with pytest.raises(StrategyError, match=r"nowhere.invalid:1 \(its name does not resolve"):
        meet(worker(("127.0.0.1:0", "nowhere.invalid:1"), 0), 1)
    assert capfd.readouterr().err.count("waits for worker 1 at nowhere.invalid:1") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"versions": "tensorflow 2.20"}, "same versions.*tensorflow 2.21.*tensorflow 2.20"),
        ({"third": "127.0.0.1:4"}, "same addresses.*127.0.0.1:3.*127.0.0.1:4"),
        ({"index": 0}, "place of its own.*worker 0"),
    ],
)
def test_workers_that_do_not_fit_are_told(
    change: dict[str, Any], message: str, addresses: tuple[str, str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(rendezvous, "_PARTING_S", 1.0)
    third = "127.0.0.1:3"
    everyone = (*addresses, third)
    errors: dict[int, str] = {}

    def comes(number: int, cluster: Cluster, versions: str) -> None:
        try:
            meet(cluster, 20, versions)
        except StrategyError as error:
            errors[number] = str(error)

    theirs = (*addresses, change.get("third", third))
    if "index" in change:  # under its own name, as on another machine
        theirs = (addresses[1], addresses[0], third)
    clusters = [worker(everyone, 0), worker(theirs, change.get("index", 1))]
    versions = ["tensorflow 2.21", change.get("versions", "tensorflow 2.21")]
    threads = [
        threading.Thread(target=comes, args=(i, clusters[i], versions[i]), daemon=True)
        for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert re.search(message, errors[0])
    assert len(errors) == 2


def test_a_port_in_use_is_named(addresses: tuple[str, str]) -> None:
    port = int(addresses[0].rpartition(":")[2])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(StrategyError, match=f"port {port}"):
            meet(worker(addresses, 0), 5)


def run(code: str, **environ: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**QUIET, **environ},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.stdout + done.stderr


def test_connecting_too_late_says_what_to_do(addresses: tuple[str, str]) -> None:
    config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": 0}}
    code = "import keras, tfdist; keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]);"
    printed = run(f"{code} tfdist.init()", TF_CONFIG=json.dumps(config))
    assert "StrategyError" in printed
    assert "Call tfdist.init() right after the imports" in printed
    assert "tfdist run" in printed


def test_a_strategy_instance_is_adopted() -> None:
    strategy = tf.distribute.OneDeviceStrategy("CPU:0")
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    x = np.ones((10, 4), "float32")
    history = tfdist.fit(model, x, x[:, :1], batch_size=4, verbose=0, strategy=strategy)
    assert len(history.history["loss"]) == 1
    with pytest.raises(StrategyError, match="synchronous"):
        tfdist.fit(model, x, x[:, :1], strategy=object())


def test_an_evaluator_leaves_out_strategies_of_several_processes() -> None:
    evaluator = Cluster({}, "evaluator", 0, "TF_CONFIG")
    for name in ("multi_worker", "parameter_server"):
        assert strategies.choose(name, evaluator)[0].name == "single"
        with pytest.raises(StrategyError):
            strategies.choose(name, Cluster())


def test_names_that_no_service_knows_are_waited_for() -> None:
    wait_until_resolved(["localhost"], 1)
    with pytest.raises(
        StrategyError, match=r"no-such-host.invalid \(its name does not resolve"
    ):
        wait_until_resolved(["localhost", "no-such-host.invalid"], 0)


def test_a_wait_for_others_has_a_limit() -> None:
    code = (
        "import time\nfrom tfdist.watchdog.timeouts import WaitLimit\n"
        "with WaitLimit(0.5, 'worker 1').waiting_for('a step'): time.sleep(60)"
    )
    printed = run(code)
    warning, error = printed.index("warning: worker 1 has waited"), printed.index("more than")
    assert warning < error
    assert printed.count("warning: ") == 1
    assert "worker 1 waited more than 0.5 s for a step" in printed
    assert "TFDIST_STEP_TIMEOUT" in printed


def test_long_waits_are_warned_of_less_and_less() -> None:
    code = (
        "import time\nfrom tfdist.watchdog.timeouts import WaitLimit\n"
        "wait_limit = WaitLimit(4, 'worker 1')\n"
        "for wait in (0.1, 2.3, 1.8):\n"
        "    with wait_limit.waiting_for('a step'): time.sleep(wait)"
    )
    printed = run(code)
    assert printed.count("warning: worker 1 has waited") == 1
    assert "given up at 4 s (TFDIST_STEP_TIMEOUT)" in printed


def test_time_to_trace_is_no_wait_for_others() -> None:
    code = (
        "import time\nfrom tfdist.watchdog.timeouts import WaitLimit\n"
        "from tfdist.watchdog import here\n"
        "drawn = 0\n"
        "here.at, here.data_counts = 'first step', lambda: (drawn, 0)\n"
        "with WaitLimit(4, 'worker 1').waiting_for('step 1'):\n"
        "    time.sleep(4.5); drawn = 1; print('drawn', flush=True); time.sleep(2.5)"
    )
    printed = run(code)
    assert printed.startswith("drawn\n"), printed
    assert "warning: worker 1 has waited 1 s for step 1" in printed


def test_a_wait_for_one_that_traces_is_told_gently() -> None:
    code = (
        "import time\nfrom tfdist.cluster.key_value_store import KeyValueStore\n"
        "from tfdist.watchdog.timeouts import WaitLimit\n"
        "class Notes(KeyValueStore):\n"
        "    def post(self, name, text): return True\n"
        "    def read(self, name): return 'preparing step 1' if name[-1] == '0' else None\n"
        "with WaitLimit(4, 'worker 1', Notes(2), 1).waiting_for('step 1'): time.sleep(2.5)"
    )
    printed = run(code)
    assert "worker 1 has waited 1 s for step 1, which others still trace" in printed
    assert "worker 0 is preparing step 1" in printed
    assert "warning" not in printed


class Many(Single):
    """A strategy that claims replicas, to describe."""

    def __init__(self, replicas: int) -> None:
        self.place = Place(replicas, 0, replicas)


@pytest.mark.parametrize(
    ("replicas", "batch", "ending"),
    [
        (1, 64, "): 1 replica"),
        (2, None, "): 2 replicas"),
        (3, 64, "): 3 replicas, batch 64 = 21 + 21 + 22"),
        (8, 100, "): 8 replicas, batch 100 = 4 x 12 + 4 x 13"),
    ],
)
def test_one_line_says_it_all(replicas: int, batch: Any, ending: str) -> None:
    strategy: Strategy = Many(replicas)
    line = Session(strategy, "as asked for", None).describe(batch)
    assert line == f"tfdist: single (as asked for{ending}"
