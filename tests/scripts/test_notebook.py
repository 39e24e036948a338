"""`tfdist.notebook_launcher`, from a program whose output is no file, as in a notebook."""

from __future__ import annotations

import contextlib
import html
import io
import re
import sys
import threading

import keras
import numpy as np
import pytest

import tfdist
from tfdist.errors import ArgumentError, LaunchError, MissingPackageError
from tfdist.figures import html_table


class Cell(io.TextIOBase):
    """What a cell shows. It has no file descriptor."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)


def define(text):
    """Defines a function as a cell does: in no file, and with `__main__` for its module."""
    space: dict = {"__name__": "__main__"}
    exec(text, space)
    return space["train"]


TRAINS = """
import keras, numpy as np, tfdist
scale = 3
def rows():
    x = np.linspace(0, 1, 128, dtype="float32").reshape(32, 4)
    return x, x.sum(axis=1, keepdims=True) * scale
def model_of(seed):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    return model
def train(epochs):
    x, y = rows()
    model = model_of(4)
    place = tfdist.init().strategy.place
    history = tfdist.fit(model, x, y, batch_size=8, epochs=epochs, shuffle=False, verbose=2)
    return {"history": history, "weights": model.get_weights(), "workers": place.num_workers}
"""


@pytest.mark.cluster
@pytest.mark.waits
@pytest.mark.timeout(900)
def test_two_workers_train_as_one_process_that_has_used_tensorflow():
    train = define(TRAINS)
    cell_s = train.__globals__
    x, y = cell_s["rows"]()
    model = cell_s["model_of"](4)  # TensorFlow has run here before the workers start
    expected = model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    with contextlib.redirect_stdout(Cell()) as cell:
        found = tfdist.notebook_launcher(train, num_workers=2, args=(2,))
    assert found["workers"] == 2
    assert isinstance(found["history"], keras.callbacks.History)
    assert found["history"].epoch == [0, 1]
    assert found["history"].history["loss"] == pytest.approx(expected.history["loss"], rel=1e-5)
    for mine, keras_s in zip(found["weights"], model.get_weights(), strict=True):
        np.testing.assert_allclose(mine, keras_s, rtol=1e-5, atol=1e-6)
    assert "Epoch 2/2" in cell.text
    assert cell.text.count("Epoch 2/2") == 1  # from the chief alone


@pytest.mark.full
@pytest.mark.cluster
@pytest.mark.timeout(900)
class TestErrors:
    def test_the_first_error_comes_in_the_cell(self):
        with pytest.raises(LaunchError, match="ZeroDivisionError: division by zero"):
            tfdist.notebook_launcher(define("def train():\n    return 1 / 0"), 2)

    def test_a_function_that_ends_the_worker(self):
        with pytest.raises(LaunchError, match="The function must return"):
            tfdist.notebook_launcher(define("def train():\n    raise SystemExit"), 1)

    def test_a_result_that_cannot_be_pickled(self):
        text = "import threading\ndef train():\n    return threading.Lock()"
        with pytest.raises(LaunchError, match="What the function returns must be picklable"):
            tfdist.notebook_launcher(define(text), 1)


@pytest.mark.quick
class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [((3,), "must be a function. Received: function=3"),
         ((len, 0), "num_workers=0"), ((len, True), "num_workers=True"),
         ((lambda a: a, 2, 5), r"write args=\(value,\)"),
         ((lambda a: a, 2), "missing a required argument: 'a'")],
    )  # fmt: skip
    def test_arguments(self, arguments, message):
        with pytest.raises(ArgumentError, match=message):
            tfdist.notebook_launcher(*arguments)

    def test_other_strategies_need_a_script(self):
        with pytest.raises(ArgumentError, match="start it with `tfdist run`"):
            tfdist.notebook_launcher(lambda: None, strategy="horovod")

    def test_what_cannot_be_pickled_is_named(self):
        lock = threading.Lock()
        with pytest.raises(ArgumentError, match="the variable 'lock', a lock: TypeError"):
            tfdist.notebook_launcher(lambda: lock)
        with pytest.raises(ArgumentError, match=r"args\[1\], a generator"):
            tfdist.notebook_launcher(lambda a, b: a, 2, (1, (x for x in "ab")))

    def test_without_cloudpickle_the_command_is_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "cloudpickle", None)
        with pytest.raises(MissingPackageError, match=r"pip install 'tfdist\[notebook\]'"):
            tfdist.notebook_launcher(lambda: None)


@pytest.mark.quick
class TestReportsInNotebooks:
    def test_text_is_escaped(self):
        shown = html_table(["<a>"], [["b & c"]], above="x\ny")
        assert "<p>x<br>y</p>" in shown
        assert "<th>&lt;a&gt;</th>" in shown
        assert "<td>b &amp; c</td>" in shown

    def test_classes(self):
        shown = tfdist.imbalance.report(["<cat>"] * 3 + ["dog"])._repr_html_()
        assert "4 rows, 2 classes, ratio 3.0" in shown
        assert "<td>&lt;cat&gt;</td><td>3</td><td>75.000%</td>" in shown

    def test_placement(self):
        from tfdist.strategies.placement import Home, Placement

        homes = (Home("dense/kernel", (2, 3), 1, 24, 48),)
        shown = Placement(homes, 2)._repr_html_()
        assert "<td>dense/kernel</td><td>(2, 3)</td><td>ps 1</td><td>24</td>" in shown
        assert "ps 0: 0, ps 1: 72" in shown

    def test_placement_on_devices(self):
        from tfdist.sharding.placement import DeviceHome, DevicePlacement

        homes = (DeviceHome("dense/kernel", (2, 3), "(-, model)", "own slice", 12, 24),)
        placement = DevicePlacement(homes, 2)
        shown = placement._repr_html_()
        assert "<td>dense/kernel</td><td>(2, 3)</td><td>(-, model)</td>" in shown
        assert "bytes on each of 2 device(s): 36" in shown
        assert str(placement).splitlines() == [
            "variable      shape   layout      use        bytes  optimizer's",
            "dense/kernel  (2, 3)  (-, model)  own slice     12           24",
            "bytes on each of 2 device(s): 36",
        ]

    def test_privacy_never_shows_less_than_is_spent(self):
        from tfdist.privacy.accounting.ledger import Ledger, Phase
        from tfdist.privacy.accounting.report import Report

        steps = Phase(sampling_probability=0.1, noise_multiplier=1.0, steps=10)
        spent = Report(Ledger((steps,)), 1e-5, secret=False)
        shown = spent._repr_html_()
        epsilon = re.search(r"<td>epsilon</td><td>([\d.]+)</td>", shown)
        assert spent.epsilon <= float(epsilon[1]) <= spent.epsilon * 1.01
        assert "<td>guarantee</td><td>none: a seed was given</td>" in shown
        assert html.escape(spent.statement()) in shown
