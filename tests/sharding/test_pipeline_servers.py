"""A pipeline whose stages are on other processes loses one of them."""

from __future__ import annotations

import re

import pytest

from tests.jobs import finished, tfdist_run

LIMIT_S = 400
SCRIPT = """
import json, os, pathlib, sys
import keras, numpy as np, psutil, tfdist

task, folder = sys.argv[1], pathlib.Path(sys.argv[2])
x = np.random.default_rng(0).normal(size=(60, 8)).astype("float32")
y = x[:, :2] ** 2


def make_model():
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Dense(8, "tanh"), keras.layers.Dropout(0.2), keras.layers.Dense(2)]
    model = keras.Sequential([keras.Input((8,)), *layers])
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    return model


class Loss(keras.callbacks.Callback):
    # Kills a process of the run, once, in the second epoch.
    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        marker = folder / "lost"
        if self.epoch == 1 and batch == 2 and not marker.exists():
            marker.touch()
            for process in psutil.Process(os.getppid()).children():
                found = json.loads(process.environ()["TF_CONFIG"])["task"]
                if f"{found['type']} {found['index']}" == task:
                    process.kill()


options = {"batch_size": 10, "epochs": 3, "shuffle": False, "verbose": 0}
expected, model = make_model(), make_model()
keras.utils.set_random_seed(2)
expected.fit(x, y, **options)
keras.utils.set_random_seed(2)
tfdist.fit(model, x, y, strategy=tfdist.Pipeline(2, 2), checkpoint=folder / "checkpoints",
           callbacks=[Loss()], **options)
pairs = zip(expected.get_weights(), model.get_weights())
print("RESULT", max(float(np.max(np.abs(a - b))) for a, b in pairs), flush=True)
"""


@pytest.mark.full
@pytest.mark.cluster
@pytest.mark.waits
@pytest.mark.timeout(LIMIT_S + 60)
@pytest.mark.parametrize("task", ["worker 0", "ps 0"])
def test_it_goes_on_from_the_checkpoint_with_the_same_weights(task, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    options = ["--ps", "1", "--max-restarts", "2"]
    status, printed = finished(tfdist_run(1, script, task, tmp_path, options=options), LIMIT_S)
    assert status == 0, printed
    assert f"{task} was ended by signal 9 (SIGKILL)" in printed
    assert "training goes on from" in printed
    assert float(re.findall(r"RESULT (\S+)", printed)[-1]) < 1e-5
