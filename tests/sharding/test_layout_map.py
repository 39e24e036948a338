"""Along which axis `tfdist.layout_map` divides weights, and which layers teams compute."""

from __future__ import annotations

import keras
import pytest

import tfdist
from tfdist import _keras
from tfdist.errors import ArgumentError

L = keras.layers
MESH = {"batch": 2, "model": 2}
pytestmark = pytest.mark.quick


def model():
    words = keras.Input((6,), dtype="int32")
    x = L.Embedding(30, 8, name="words")(words)
    x = x + L.MultiHeadAttention(4, 2, name="heads")(x, x)
    hidden = L.Dropout(0.1)(L.Dense(32, "relu", name="up")(x))
    x = x + L.Dense(8, name="down")(hidden)
    x = L.Conv1D(7, 2, name="conv")(x)
    return keras.Model(words, L.Dense(3, name="odd")(x))


def test_each_layer_has_its_axis():
    assert tfdist.layout_map(model(), MESH) == {
        "words/embeddings": ("model", None),
        "heads/query/kernel": (None, "model", None),
        "heads/query/bias": ("model", None),
        "heads/key/kernel": (None, "model", None),
        "heads/key/bias": ("model", None),
        "heads/value/kernel": (None, "model", None),
        "heads/value/bias": ("model", None),
        "heads/attention_output/kernel": ("model", None, None),
        "up/kernel": (None, "model"),
        "up/bias": ("model",),
        "down/kernel": ("model", None),
        "conv/kernel": (None, "model", None),
    }


def test_a_team_computes_what_it_can():
    made = model()
    axes = dict(_keras.dividing_axes(made, 2))
    plan = _keras.parallel_plan(made, axes, 2)
    assert sorted(plan.layers) == ["down", "heads", "up", "words"]
    assert [layer.name for layer in plan.unchecked] == ["down"]  # whose input stays cut
    assert len(plan.weights) == len(axes) - 1  # but that of the Conv1D


def test_a_kernel_with_adapters_is_gathered_and_no_columns_stay_cut_for_it():
    made = model()
    made.get_layer("down").enable_lora(2)
    plan = _keras.parallel_plan(made, dict(_keras.dividing_axes(made, 2)), 2)
    assert sorted(plan.layers) == ["heads", "up", "words"]
    assert not plan.unchecked


def test_heads_that_cannot_be_divided_leave_other_axes():
    x = keras.Input((4, 16))
    made = keras.Model(x, L.MultiHeadAttention(6, 4, name="heads")(x, x))
    found = tfdist.layout_map(made, {"batch": 1, "model": 4})
    kernels = {key: axes for key, axes in found.items() if "kernel" in key}
    assert kernels == {
        "heads/query/kernel": ("model", None, None),
        "heads/key/kernel": ("model", None, None),
        "heads/value/kernel": ("model", None, None),
        "heads/attention_output/kernel": (None, None, "model"),
    }
    plan = _keras.parallel_plan(made, dict(_keras.dividing_axes(made, 4)), 4)
    assert sorted(plan.layers) == ["attention_output", "key", "query", "value"]


@pytest.mark.parametrize("mesh", [{"batch": 4}, {"batch": 1, "model": 2, "other": 2}])
def test_a_mesh_must_have_one_axis_for_layers(mesh):
    with pytest.raises(ArgumentError, match="one axis of several devices"):
        tfdist.layout_map(model(), mesh)
