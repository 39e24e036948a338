"""Workers that would train models of their own, without a word of tfdist."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.jobs import finished, tfdist_run

pytestmark = [pytest.mark.cluster, pytest.mark.waits]

HEAD = """
import keras
import numpy as np
import tensorflow as tf
x = np.random.rand(64, 4).astype("float32")
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
model.compile("sgd", "mse")
"""
FIT = "model.fit(x, x[:, :1], verbose=0)\n"
# Other numbers on each worker: they are alike only if all take the chief's state.
ON_BATCH = "model.train_on_batch(x, x[:, :1] + np.random.default_rng().random((64, 1)))\n"
LOOP = """
optimizer = keras.optimizers.SGD()
with tf.GradientTape() as tape:
    loss = tf.reduce_mean(model(x) ** 2)
optimizer.apply(tape.gradient(loss, model.trainable_weights), model.trainable_weights)
"""
SHOW = 'print("WEIGHTS", model.get_weights()[0].ravel().tolist())\n'


def ran(folder: Path, script: str, *options: str) -> tuple[int, str]:
    path = folder / "train.py"
    path.write_text(HEAD + script + SHOW)
    return finished(tfdist_run(2, path, options=options), 120)


@pytest.mark.parametrize(
    ("script", "what"),
    [(FIT, "`model.fit`"), pytest.param(LOOP, "a training loop", marks=pytest.mark.full)],
)
def test_a_script_that_knows_nothing_is_refused(tmp_path: Path, script: str, what: str) -> None:
    status, output = ran(tmp_path, script)
    assert status == 1
    assert f"a script that trains with {what}" in output.replace("\n", " ")
    assert "tfdist run --drop-in" in output


@pytest.mark.full
def test_a_script_that_names_tfdist_is_told(tmp_path: Path) -> None:
    status, output = ran(tmp_path, "import tfdist\n" + FIT)
    assert status == 0
    assert "`model.fit` is Keras's own and trains this worker alone" in output


def test_loops_of_the_drop_in_end_alike_and_say_so(tmp_path: Path) -> None:
    status, output = ran(tmp_path, ON_BATCH * 3 + LOOP, "--drop-in")
    assert status == 0
    weights = {
        line.partition("WEIGHTS")[2] for line in output.splitlines() if "WEIGHTS" in line
    }
    assert len(weights) == 1
    assert "`train_on_batch` computes its whole batch on every worker" in output
    assert "the script's own training loop runs on every worker" in output
