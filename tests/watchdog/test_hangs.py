"""Runs that hang, each for another reason: what is said, and the exit status."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.jobs import finished, tfdist_run
from tfdist.errors import HUNG

LIMIT_S = 120
pytestmark = [pytest.mark.cluster, pytest.mark.waits, pytest.mark.timeout(2 * LIMIT_S)]
SCRIPT = """
import os, signal, sys, time
import keras, tensorflow as tf, tfdist
from tests.equivalence.cases import mlp, table
from tfdist.watchdog import memory

case = sys.argv[1]
place = tfdist.init(seed=3).strategy.place
is_last = place.worker_index == place.num_workers - 1
model = mlp("sgd")

class At(keras.callbacks.Callback):
    def __init__(self, step, action):
        super().__init__()
        self.step, self.action = step, action

    def on_train_batch_end(self, batch, logs=None):
        if batch + 1 == self.step:
            self.action()

def fit(*callbacks):
    tfdist.fit(model, *table(), batch_size=64, epochs=2, callbacks=list(callbacks), verbose=0)

def stop():
    os.kill(os.getpid(), signal.SIGSTOP)

def fail():
    raise ValueError("mine")

def rows(stall, late):
    x, y = table(640)
    for i in range(10):
        if i == late and is_last:
            time.sleep(stall)
        yield x[i * 64:i * 64 + 64], y[i * 64:i * 64 + 64]

def fit_rows(stall, late=7):
    spec = (tf.TensorSpec([None, 20]), tf.TensorSpec([None], tf.int32))
    data = tf.data.Dataset.from_generator(rows, args=[stall, late], output_signature=spec)
    tfdist.fit(model, data, verbose=0)

if case == "stopped":
    fit(*[At(12, stop)] * is_last)
if case == "chief stopped":
    fit(*[At(12, stop)] * place.is_chief)
if case == "early":
    try:
        fit(*[At(12, fail)] * is_last)
    except ValueError:
        time.sleep(100)
if case == "times":
    for _ in range(2 if is_last else 3):
        fit()
if case == "function":
    fit()
    if is_last:
        tfdist.evaluate(model, *table(), verbose=0)
    else:
        fit()
if case == "data":
    if is_last:  # as if little memory was left
        memory.PROC = type(memory.PROC)(sys.argv[2])
    fit_rows(100)
if case == "short data":
    x, y = table(640)
    batches = ((x[:32], y[:32]) for _ in range(10 if is_last else 20))
    tfdist.fit(model, batches, verbose=0)
if case == "leaves" and is_last:
    sys.exit()
if case == "leaves":
    fit()
if case == "slow data":
    fit_rows(14, late=9)  # the run ends as soon as the last batch comes
if case == "callback":
    fit(*[At(12, lambda: time.sleep(8))] * is_last)
print("DONE")
"""


def hanging(tmp_path: Path, case: str, command: list[str], limit: float = 2) -> tuple[int, str]:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    environ = {"TFDIST_HANG_LIMIT": str(limit)}
    return finished([*command, str(script), case, str(tmp_path)], LIMIT_S, environ)


@pytest.mark.parametrize(
    ("strategy", "case", "status", "said"),
    [
        ("horovod", "stopped", HUNG, ["worker 1 has not answered", "stopped (SIGSTOP"]),
        ("multi_worker", "chief stopped", HUNG, ["worker 0 has not answered", "`kill -CONT "]),
        pytest.param(
            "multi_worker",
            "early",
            HUNG,
            ["worker 1 has left `fit`", "after step 12", "in <module>: time.sleep(100)"],
            marks=pytest.mark.full,
        ),
        pytest.param(  # the next one is of the same kind
            *("horovod", "times", 1, ["worker 1 has ended, after 2 calls", "call number 3"]),
            marks=pytest.mark.full,
        ),
        pytest.param(
            *(
                "multi_worker",
                "short data",
                HUNG,
                ["data of worker 1 has ended before step 11"],
            ),
            marks=pytest.mark.full,
        ),
        pytest.param(
            *(
                "multi_worker",
                "leaves",
                1,
                ["worker 1 has ended, after 0 calls, while worker 0"],
            ),
            marks=pytest.mark.full,
        ),
        ("multi_worker", "function", 1, ["worker 0: `fit`; worker 1: `evaluate`"]),
        pytest.param(
            "multi_worker",
            "data",
            HUNG,
            [
                "worker 1 waits for its data",
                "in rows: time.sleep(stall)",
                "Likely cause: worker 1 is almost out of memory: 50 MiB are left of 4000",
                "If not within",
            ],
            marks=pytest.mark.full,
        ),
        pytest.param("horovod", "callback", 0, ["DONE"], marks=pytest.mark.full),
    ],
)
def test_a_hang_has_a_diagnosis(
    strategy: str, case: str, status: int, said: list[str], tmp_path: Path
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 4096000 kB\nMemAvailable: 51200 kB\n")
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "status").write_text("VmRSS: 1024000 kB\n")
    command = tfdist_run(2, options=["--strategy", strategy])
    found, printed = hanging(tmp_path, case, command)
    assert found == status, printed
    for words in said:
        assert words in printed, printed
    reports = printed.count("│ tfdist: the run hangs: ")
    assert reports == (2 if status == HUNG else 0), printed  # the launcher repeats it


def test_a_slow_pipeline_is_reported_and_goes_on(tmp_path: Path) -> None:
    found, printed = hanging(tmp_path, "slow data", [sys.executable], limit=2)
    assert found == 0, printed
    assert "waits for its data" in printed
    assert "in rows: time.sleep(stall)" in printed
    assert printed.count("tfdist: the run hangs: ") == 1
    assert "tfdist: the run goes on." in printed


@pytest.mark.full
def test_it_can_be_switched_off(tmp_path: Path) -> None:
    command = [sys.executable]
    found, printed = hanging(tmp_path, "slow data", command, limit=0)
    assert found == 0, printed
    assert "hangs" not in printed
