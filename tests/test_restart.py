"""Workers that are killed, and a run that is started again: the same bits."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import finished, tfdist_run

LIMIT_S = 300
STEP = 10  # of 3 epochs of 8
TRAIN = """
import hashlib, json, os, signal, sys
import keras, numpy as np, tfdist
from tests.equivalence.cases import clipped_adam, mlp, table

folder, step, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
place = tfdist.init(seed=3).strategy.place
model = mlp(clipped_adam())
every = 1 if number == signal.SIGKILL else 1000
died = os.path.join(folder, "died")

class Dies(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        last = place.worker_index == place.num_workers - 1
        if last and int(model.optimizer.iterations) == step and not os.path.exists(died):
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

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(4 * LIMIT_S)]


def results(printed: str) -> list[Any]:
    return [json.loads(text) for text in re.findall(r"RESULT (\[.*\])", printed)]


@pytest.mark.parametrize("strategy", ["multi_worker", "horovod"])
def test_a_killed_run_that_is_started_again_ends_with_the_same_bits(
    strategy: str, tmp_path: Path
) -> None:
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    options = ["--strategy", strategy]

    def run(folder: str, step: int, *more: str) -> tuple[int, str]:
        (tmp_path / folder).mkdir(exist_ok=True)
        command = tfdist_run(2, script, tmp_path / folder, step, options=[*options, *more])
        return finished(command, LIMIT_S)

    status, printed = run("whole", 0)
    assert status == 0, printed
    expected = results(printed)
    assert len(expected) == 2

    status, printed = run("killed", STEP)
    assert status != 0
    assert results(printed) == []
    shutil.copytree(tmp_path / "killed", tmp_path / "alone")
    status, printed = run("killed", STEP)
    assert status == 0, printed
    assert results(printed) == expected

    # One process: the same but for the order of additions.
    command = [sys.executable, str(script), str(tmp_path / "alone"), str(STEP)]
    status, printed = finished(command, LIMIT_S)
    assert status == 0, printed
    ((_, history, sums),) = results(printed)
    assert sums == pytest.approx(expected[0][2], rel=1e-4)
    for name, values in expected[0][1].items():
        assert history[name] == pytest.approx(values, rel=1e-4), name

    status, printed = run("restarted", STEP, "--max-restarts", "1")
    assert status == 0, printed
    assert "All are started again (1 of 1)" in printed
    assert results(printed) == expected
