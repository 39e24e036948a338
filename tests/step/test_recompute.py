"""Which layers `tfdist.recompute` chooses, and what becomes of the model."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import tfdist
from tfdist import _keras
from tfdist.errors import ArgumentError

L = keras.layers
pytestmark = pytest.mark.quick


def chain(name: str, *widths: int) -> Any:
    return keras.Sequential([L.Dense(width) for width in widths], name=name)


def model() -> Any:
    blocks = [chain(f"block_{i}", 4, 4) for i in range(3)]
    made = keras.Sequential([keras.Input((4,)), *blocks, L.Dense(1, name="head")])
    made.compile("sgd", "mse")
    return made


class Outer(keras.Model):  # type: ignore[misc]
    """A model of given parts."""

    def __init__(self, *parts: Any) -> None:
        super().__init__()
        self.parts = list(parts)


class Encoder(L.Layer):  # type: ignore[misc]
    """Several blocks, each of which has two parts of the same kind."""

    def __init__(self, name: str, blocks: int = 3) -> None:
        super().__init__(name=name)
        self.blocks = [Outer(chain("a", 4), chain("b", 4)) for _ in range(blocks)]
        for number, block in enumerate(self.blocks):
            block.name = f"block_{number}"


@pytest.mark.parametrize(
    ("made", "paths"),
    [
        (model(), "block_0 block_1 block_2"),
        # More blocks than encoders, and than parts of a block.
        (
            Outer(Encoder("one"), Encoder("two")),
            "one/block_0 one/block_1 one/block_2 two/block_0 two/block_1 two/block_2",
        ),
        (Outer(Encoder("one", 1), L.Dense(2)), "one/block_0/a one/block_0/b"),
        (
            Outer(chain("wide", 4, 4), chain("narrow", 4), L.MultiHeadAttention(2, 2)),
            "wide narrow",
        ),
    ],
)  # fmt: skip
def test_blocks_are_the_layers_that_repeat(made: Any, paths: str) -> None:
    assert tfdist.recompute(made).paths == tuple(paths.split())


def test_layers_are_chosen_by_name_path_and_object() -> None:
    made = model()
    dense = made.layers[0].layers[0].name
    chosen = tfdist.recompute(made, ["block_2", f"block_0/{dense}", made.layers[1]])
    assert chosen.paths == ("block_2", f"block_0/{dense}", "block_1")
    assert "  block_1 (Sequential)" in str(chosen)
    # A new call replaces the choice.
    assert tfdist.recompute(made, ["head"]).kinds == ("Dense",)
    assert [call.layer.name for call in _keras.recomputed_calls(made)] == ["head"]
    assert str(tfdist.recompute(made, layers=[])) == "all activations are kept"
    assert not any("call" in vars(layer) for layer in _keras.layers_of(made))


@pytest.mark.parametrize(
    ("make", "layers", "words"),
    [
        (model, ["blok_1"], "'blok_1', which is none of them. Names like it: block_1"),
        (model, "block_1", r'must be "blocks".*layers=\[\'block_1\'\]'),
        (lambda: chain("flat", 4, 4), "blocks", "model 'flat', whose layers have no parts"),
        (lambda: 3, "blocks", "`model` must be a keras.Model"),
    ],
)
def test_a_wrong_choice_is_refused(make: Any, layers: Any, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        tfdist.recompute(make(), layers)


def test_functions_are_traced_again_and_files_are_ordinary(tmp_path: Path) -> None:
    made, x = model(), np.ones((8, 4), "float32")
    tfdist.fit(made, x, x[:, :1], verbose=0, seed=1)
    traced = _keras.attached(made).prepared
    tfdist.recompute(made)
    made.fit(x, x[:, :1], verbose=0)
    tfdist.fit(made, x, x[:, :1], verbose=0, seed=1)
    assert _keras.attached(made).prepared is not traced
    made.save(tmp_path / "model.keras")
    for copy in (
        keras.models.load_model(tmp_path / "model.keras"),
        pickle.loads(pickle.dumps(made)),
    ):
        assert not _keras.recomputed_calls(copy)
        np.testing.assert_array_equal(copy.predict(x, verbose=0), made.predict(x, verbose=0))


def test_private_training_refuses_it() -> None:
    made, x = model(), np.ones((8, 4), "float32")
    tfdist.recompute(made)
    privacy = tfdist.DPSGD(1.0, noise_multiplier=1.0, delta=1e-2)
    with pytest.raises(ArgumentError, match=r"must keep its activations.*'block_0'"):
        tfdist.fit(made, x, x[:, :1], privacy=privacy, verbose=0)
