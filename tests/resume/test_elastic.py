"""Elastic Horovod: a rank is killed, the others go on, its host comes back; also privately.

Where it is not private, a `tf.data.Dataset` that shuffles is what it trains from.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.jobs import finished
from tfdist.privacy import Ledger, epsilon

LIMIT_S = 300
HOSTS = ("localhost", "127.0.0.1")  # two, by the two names of this machine
# A host of which a rank failed is left out for so many seconds.
SHORT, LONG = ("2", "4"), ("300", "400")
TRAIN = """
import json, os, signal, sys, time
from pathlib import Path
import keras, numpy as np, tensorflow as tf, tfdist
from tests.equivalence.cases import clipped_sgd, mlp, table

_, victim, folder, seconds, private = sys.argv
host = os.environ.get("HOROVOD_HOSTNAME")
died = Path(folder) / "died"
tfdist.init(seed=3)
keras.utils.set_random_seed(3)
model = mlp(clipped_sgd() if private == "no" else keras.optimizers.SGD(0.1))
callbacks, options = [keras.callbacks.EarlyStopping("loss", patience=3)], {}
rows = tf.data.Dataset.from_tensor_slices(table())
data = {"x": rows.shuffle(300).batch(64)}
if private != "no":
    noise, seed = {"noise": (1.5, None), "noiseless": (0.0, 3)}[private]
    privacy = tfdist.DPSGD(0.5, noise_multiplier=noise, delta=1e-4, seed=seed)
    callbacks, options = [], {"privacy": privacy, "seed": seed}
    data = {"x": table()[0], "y": table()[1], "batch_size": 64}

class Events(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        time.sleep(float(seconds))
        if host == victim and int(model.optimizer.iterations) == 24 and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)

checkpoint = keras.callbacks.ModelCheckpoint(Path(folder) / "{epoch}.keras")
history = tfdist.fit(
    model, **data, epochs=4, validation_data=table(101), verbose=0,
    callbacks=[*callbacks, checkpoint, Events()], **options,
)
print("RESULT", json.dumps({
    "host": host,
    "history": history.history,
    "epochs": history.epoch,
    "weights": [w.tolist() for w in model.get_weights()],
    "steps": int(model.optimizer.iterations),
    "replicas": tfdist.init().strategy.place.num_replicas,
    "ledger": history.privacy.ledger.to_dict() if options else None,
    "epsilon": history.privacy.epsilon if private == "noise" else None,
}), flush=True)
"""

pytestmark = [pytest.mark.cluster, pytest.mark.waits, pytest.mark.timeout(2 * LIMIT_S)]


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("elastic") / "train.py"
    path.write_text(TRAIN)
    return path


def results(command: list[str]) -> tuple[list[dict], str]:
    status, printed = finished(command, LIMIT_S)
    assert status == 0, printed
    return [json.loads(text) for text in re.findall(r"RESULT (\{.*\})", printed)], printed


def by_itself(script: Path, private: str) -> dict:
    train = [sys.executable, str(script), "nobody", str(script.parent), "0", private]
    (result,), _ = results(train)
    return result


@pytest.fixture(scope="module")
def alone(script: Path) -> dict:
    return by_itself(script, "no")


def elastic(
    script: Path,
    victim: str,
    folder: Path,
    seconds: float,
    private: str = "no",
    cooldown: tuple[str, str] = SHORT,
) -> tuple[list[dict], str]:
    discover = folder / "discover.sh"
    discover.write_text("#!/bin/sh\n" + "".join(f"echo {host}:1\n" for host in HOSTS))
    discover.chmod(0o755)
    launch = [sys.executable, "-m", "horovod.runner.launch", "--gloo", "-np", "2"]
    options = ["--min-np", "1", "--max-np", "3", "--host-discovery-script", str(discover)]
    options += ["--blacklist-cooldown-range", *cooldown]
    train = [sys.executable, str(script), victim, str(folder), str(seconds), private]
    return results([*launch, *options, *train])


def assert_equal(result: dict, expected: dict) -> None:
    assert result["steps"] == expected["steps"]
    assert result["epochs"] == expected["epochs"]
    assert result["history"].keys() == expected["history"].keys()
    for name, values in expected["history"].items():
        assert result["history"][name] == pytest.approx(values, rel=1e-5), name
    for ours, theirs in zip(result["weights"], expected["weights"], strict=True):
        assert np.ravel(ours) == pytest.approx(np.ravel(theirs), rel=1e-4, abs=1e-6)


@pytest.mark.full  # below, a rank goes on alone, and a host joins a private training
def test_a_host_that_comes_back_joins_in_the_middle(script, alone, tmp_path):
    # The first rank is the one that is killed: another becomes the chief, and writes.
    found, printed = elastic(script, "localhost", tmp_path, 0.4)
    assert sorted(result["host"] for result in found) == sorted(HOSTS), printed
    assert "ready to join" in printed
    for result in found:
        assert result["replicas"] == 2
        assert_equal(result, alone)
    assert found[0]["weights"] == found[1]["weights"]
    assert sorted(path.name for path in tmp_path.glob("*.keras")) == [
        f"{epoch}.keras" for epoch in range(1, 5)
    ]


def test_the_others_go_on_when_a_rank_is_killed(script, tmp_path):
    expected = by_itself(script, "noiseless")
    found, printed = elastic(script, "127.0.0.1", tmp_path, 0, "noiseless", LONG)
    assert [result["host"] for result in found] == ["localhost"], printed
    assert (tmp_path / "died").exists()
    assert_equal(found[0], expected)
    assert Ledger.from_dict(found[0]["ledger"]) == Ledger.from_dict(expected["ledger"])


@pytest.mark.full
def test_a_host_that_comes_back_joins_a_private_training(script, tmp_path):
    # Without noise, the training is that of one process.
    expected = by_itself(script, "noiseless")
    found, printed = elastic(script, "localhost", tmp_path, 0.4, "noiseless")
    assert sorted(result["host"] for result in found) == sorted(HOSTS), printed
    assert "ready to join" in printed
    for result in found:
        assert_equal(result, expected)
        assert Ledger.from_dict(result["ledger"]) == Ledger.from_dict(expected["ledger"])
    assert found[0]["weights"] == found[1]["weights"]


@pytest.mark.full  # the ledger of the test before counts each step once
def test_every_step_counts_once_for_who_joins_a_private_training(script, tmp_path):
    found, printed = elastic(script, "localhost", tmp_path, 0.4, "noise")
    assert sorted(result["host"] for result in found) == sorted(HOSTS), printed
    assert "ready to join" in printed
    for result in found:
        assert result["steps"] == sum(phase["steps"] for phase in result["ledger"]["phases"])
        expected = epsilon(
            sampling_probability=64 / 961,
            noise_multiplier=1.5,
            steps=result["steps"],
            delta=1e-4,
        )
        assert result["epsilon"] == pytest.approx(expected, rel=1e-3)
    assert found[0]["weights"] == found[1]["weights"]
    assert found[0]["ledger"] == found[1]["ledger"]
