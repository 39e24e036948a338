"""The example notebook runs in a real kernel, and trains as plain Keras does in one process."""

from __future__ import annotations

import re

import keras
import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

from tests.examples.program import EXAMPLES

pytestmark = [pytest.mark.full, pytest.mark.waits, pytest.mark.timeout(900)]


def text_of(cell) -> str:
    return "".join(o.text for o in cell.outputs if o.output_type == "stream")


def test_the_example_notebook_trains_as_one_process(tmp_path):
    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )  # fmt: skip
    client.execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    report = code[1].outputs[0]["data"]["text/html"]
    assert "480 rows, 3 classes" in report
    launched = text_of(code[3])
    assert "worker 0" in launched
    assert "Epoch 4/4" in launched  # progress comes in the cell
    losses = [float(x) for x in re.findall(r"[\d.]+", text_of(code[4]))]
    rng = np.random.default_rng(7)
    y = rng.choice(3, size=480, p=[0.6, 0.35, 0.05])
    x = rng.normal(size=(480, 8)).astype("float32") + y[:, None]
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.05), loss)
    # Shuffling draws other orders than Keras, so a step differs, but the optimum does not.
    expected = model.fit(x, y, batch_size=48, epochs=4, verbose=0).history["loss"]
    assert losses == pytest.approx(expected, rel=0.15)
    accuracy = float(text_of(code[5]).split(":")[1])
    found = np.mean(model.predict(x, verbose=0).argmax(axis=1) == y)
    assert accuracy == pytest.approx(found, abs=0.05)


FAILS = """
import tfdist
def train(step):
    values = [1.0, 2.0]
    return values[step]
tfdist.notebook_launcher(train, 2, (5,))
"""


def test_an_error_of_a_worker_comes_in_the_cell(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(FAILS)])
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", allow_errors=True,
        resources={"metadata": {"path": str(tmp_path)}},
    )  # fmt: skip
    client.execute()
    (error,) = [o for o in notebook.cells[0].outputs if o.output_type == "error"]
    assert error.ename == "LaunchError"
    assert "IndexError: list index out of range" in error.evalue
    assert "return values[step]" in error.evalue  # a line of the cell
    assert "notebook_main" not in error.evalue
