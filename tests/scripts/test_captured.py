"""The first `fit` of a script is found, and trains nothing."""

from __future__ import annotations

import keras
import pytest

import tfdist
from tfdist import api
from tfdist.errors import ArgumentError
from tfdist.scripts.captured import first_fit
from tfdist.scripts.targets import call_of

pytestmark = pytest.mark.quick
HEAD = """
import keras, numpy as np, sys, tfdist
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
x, y = np.ones((12, 4)), np.ones((12, 1))
"""
COMPILED = HEAD + "model.compile('adam', 'mse')\n"


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["test"])
    monkeypatch.setattr("sys.path", ["", *__import__("sys").path])

    def first(text, *arguments, **options):
        script = tmp_path / "train.py"
        script.write_text(text)
        original = keras.Model.fit, keras.Model.train_on_batch, api.fit
        try:
            return call_of([str(script), *arguments], **options)
        finally:
            assert (keras.Model.fit, keras.Model.train_on_batch, api.fit) == original

    return first


@pytest.mark.parametrize(
    "line",
    ["model.fit(x, y, 6, epochs=3)", "tfdist.fit(model, x, y, batch_size=6)",
     "tfdist.init('multi_worker'); tfdist.fit(model, x=x, y=y, batch_size=6)",
     "tfdist.drop_in(); model.fit(x, y, batch_size=6)",
     "try:\n    model.fit(x, y, 6)\nexcept Exception:\n    pass"],
)  # fmt: skip
def test_the_first_fit_is_found(run, line):
    call = run(COMPILED + line + "\nraise SystemExit('trained')\n")
    assert call.x.shape == (12, 4)
    assert call.y.shape == (12, 1)
    assert call.others["batch_size"] == 6
    assert call.model.optimizer.iterations == 0


def test_arguments_reach_the_script_and_the_batch_size_is_replaced(run):
    text = COMPILED + "model.fit(x, y, batch_size=int(sys.argv[1]))\n"
    assert run(text, "3").others["batch_size"] == 3
    assert run(text, "3", batch_size=5).others["batch_size"] == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [("print(1)", "ended without"),
     (HEAD + "raise ValueError('no file')", "at line 5: no file"),
     (COMPILED + "model.train_on_batch(x, y)", "Found: `train_on_batch`"),
     (COMPILED + "sys.exit(0)", r"1 model\(s\)|\d+ model\(s\)")],
)  # fmt: skip
def test_a_script_that_does_not_train_gets_a_clear_line(run, text, message):
    with pytest.raises(ArgumentError, match=message):
        run(text)


def test_a_file_that_is_not_there():
    with pytest.raises(ArgumentError, match="which is not there"):
        first_fit(["missing.py"])
    with pytest.raises(ArgumentError, match="which is not there"):
        call_of(["missing.keras"])


def test_saved_models_and_functions(tmp_path, monkeypatch, capsys):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    model.save(tmp_path / "model.keras")
    found = call_of([str(tmp_path / "model.keras")], batch_size=8)
    assert tfdist.recommend(found.model, batch_size=8, measure=False).best.strategy == "single"
    (tmp_path / "own_models.py").write_text(
        "import keras\ndef net():\n    return keras.Sequential([keras.Input((3,)), "
        "keras.layers.Dense(1)])\ndef none():\n    return 1\n"
    )
    monkeypatch.chdir(tmp_path)
    assert call_of(["own_models:net"]).model.count_params() == 4
    assert "Adam and squares are assumed" in capsys.readouterr().err
    with pytest.raises(ArgumentError, match=r"must return a keras\.Model"):
        call_of(["own_models:none"])
    with pytest.raises(ArgumentError, match="can be imported"):
        call_of(["own_models:missing"])
