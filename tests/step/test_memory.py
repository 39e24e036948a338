"""The estimate of memory, against sums by hand."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

import tfdist
from tfdist.errors import ArgumentError

L = keras.layers
FLOAT = 4
pytestmark = pytest.mark.quick


def chain(blocks: int = 3, width: int = 8, **options: Any) -> Any:
    made = [keras.Sequential([L.Dense(width, "tanh") for _ in range(2)]) for _ in range(blocks)]
    model = keras.Sequential([keras.Input((width,)), *made, L.Dense(1)])
    model.compile("adam", "mse", **options)
    return model


def test_a_chain_of_dense_layers_keeps_its_outputs() -> None:
    found = tfdist.memory(chain(), 20, replicas=4)
    assert [d.replicas for d in found.devices] == [1, 2, 4]
    assert [d.rows for d in found.devices] == [20, 10, 5]
    weights = FLOAT * (6 * (8 * 8 + 8) + 8 + 1)
    for device in found.devices:
        # Each tanh is kept, the difference of the only output to its target, and a divisor.
        assert device.activations == FLOAT * (device.rows * (6 * 8 + 1) + 1)
        assert device.weights == device.gradients == weights
        assert device.slots == 2 * weights + 8 + FLOAT  # iterations and learning rate
        assert device.exchange == (weights if device.replicas > 1 else 0)
        assert device.activations < device.step < device.activations + 2 * weights
        assert device.total >= device.weights + device.slots + device.step


def test_recomputed_blocks_keep_their_inputs_only() -> None:
    model = chain()
    tfdist.recompute(model)
    found = tfdist.memory(model, 20)
    # The inputs of the second and third block, the last layer's, and those of the loss.
    assert found.device.activations == FLOAT * (20 * (3 * 8 + 1) + 1)
    assert found.recomputed == 3
    assert "layers that compute their activations again: 3" in str(found)


def test_it_prints_a_table() -> None:
    text = str(tfdist.memory(chain(width=512), 1024, replicas=2))
    assert "MiB on each device, single, batch of 1024" in text
    assert "examples on each          1024   512" in text
    assert "activations kept          12.0   6.0" in text


class Own(keras.Model):  # type: ignore[misc]
    """A model that does not know the shapes of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.rnn, self.dense = L.Embedding(100, 8), L.LSTM(8), L.Dense(5)

    def call(self, x: Any) -> Any:
        return self.dense(self.rnn(self.table(x["words"])))


def test_shapes_are_taken_from_examples() -> None:
    model, x = Own(), {"words": np.zeros((2, 6), "int32")}
    model.compile("sgd", "sparse_categorical_crossentropy")
    model(x)
    with pytest.raises(ArgumentError, match="`x` must be given"):
        tfdist.memory(model, 4)
    found = tfdist.memory(model, 4, x=x)
    assert found.device.gradients < found.device.weights  # only rows of the table
    assert "not counted: what is inside the loops" in str(found)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "`batch_size` must be a positive whole number"),
        ({"replicas": 1.5}, "`replicas` must be a positive whole number"),
        ({"model": keras.Sequential([L.Dense(1)])}, "`model` must be a built keras.Model"),
    ],
)
def test_what_it_cannot_estimate_is_refused(options: Any, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        tfdist.memory(**{"model": chain(), **options})
