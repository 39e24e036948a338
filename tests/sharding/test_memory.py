"""The estimate of memory, against sums by hand."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfdist
from tfdist import _keras
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
    assert found.unsized == 0
    assert "layers that compute their activations again: 3" in str(found)


def test_it_prints_a_table() -> None:
    text = str(tfdist.memory(chain(width=512), 1024, "single", replicas=2))
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


def test_what_it_cannot_count_is_said() -> None:
    x = keras.Input((8,))
    chosen = L.Lambda(lambda t: tf.boolean_mask(t, t[:, 0] > 0), output_shape=(8,))(x)
    model = keras.Model(x, L.Dense(1)(chosen))
    found = tfdist.memory(model, 4)
    assert found.unsized > 0
    assert f"not counted: {found.unsized} tensors of unknown shape" in str(found)


WIDTH, BLOCKS = 64, 4
KERNELS, BIASES = BLOCKS * WIDTH * WIDTH, BLOCKS * WIDTH


def wide() -> Any:
    made = [L.Dense(WIDTH, "tanh", name=f"dense{n}") for n in range(BLOCKS)]
    model = keras.Sequential([keras.Input((WIDTH,)), *made])
    model.compile("adam", "mse")
    return model


def test_parts_are_counted_as_parts() -> None:
    model = wide()
    whole = tfdist.memory(model, 32, replicas=4).device
    one = tfdist.memory(model, 32, tfdist.Zero(1), replicas=4).device
    three = tfdist.memory(model, 32, tfdist.Zero(3), replicas=4).device
    weights = FLOAT * (KERNELS + BIASES)
    assert (one.weights, one.gradients, one.exchange) == (weights, weights, weights / 4)
    assert one.slots == three.slots == 2 * weights / 4 + 8 + FLOAT
    assert (one.step, one.gathered) == (whole.step, 0)
    # The biases are at most 1/64 of the bytes: they stay whole, but not Adam's moments of them.
    assert BIASES <= (KERNELS + BIASES) / 64
    parts = FLOAT * (KERNELS / 4 + BIASES)
    # A bias's gradient is scattered too: its optimizer has a part of the moments.
    assert three.weights == three.gradients == parts
    assert three.exchange == 0
    # One whole kernel at a time, and its gradient before it is scattered.
    assert three.gathered == FLOAT * WIDTH * WIDTH
    most = three.gradients + 2 * FLOAT * WIDTH * WIDTH + three.activations
    assert three.gradients < three.step <= most + 8 * FLOAT * 8 * WIDTH
    assert three.total < 0.5 * whole.total
    # Kept between the passes, all but the first kernel, which the backward pass need not read.
    kept = tfdist.memory(model, 32, tfdist.Zero(3, gather_again=False), replicas=4).device
    assert kept.gathered == FLOAT * (BLOCKS - 1) * WIDTH * WIDTH
    # One replica has no parts.
    alone = tfdist.memory(model, 32, tfdist.Zero(3), replicas=4).devices[0]
    assert alone == tfdist.memory(model, 32).device


def test_slices_of_a_mesh_are_counted() -> None:
    layouts = {
        ".*dense0/kernel": (None, "model"),
        ".*dense0/bias": ("model",),
        ".*dense1/kernel": ("model", None),
    }
    parallel = tfdist.ModelParallel(layouts, {"batch": 2, "model": 2})
    found = tfdist.memory(wide(), 32, parallel)
    assert [d.replicas for d in found.devices] == [1, 4]
    kernels = (2 / 2 + 2) * WIDTH * WIDTH
    assert found.device.weights == FLOAT * (kernels + (1 / 2 + 3) * WIDTH)
    assert found.device.gathered == 0
    assert "not counted: the rows that 2 layers in parts gather" in str(found)
    with pytest.raises(ArgumentError, match="number of devices of the mesh"):
        tfdist.memory(wide(), 32, parallel, replicas=2)


def test_weights_without_values_stay_so() -> None:
    with tfdist.deferred_weights():
        model = wide()
    found = tfdist.memory(model, 32, tfdist.Zero(3), replicas=2)
    assert found.device.gathered == FLOAT * WIDTH * WIDTH
    assert all(_keras.deferred(layer.kernel) is not None for layer in model.layers)


def test_stages_of_a_pipeline_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"tfdist\.placement shows"):
        tfdist.memory(wide(), 32, tfdist.Pipeline(2, 4))


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
