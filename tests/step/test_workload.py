"""FLOPs by hand, and a timed step that leaves no trace."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfdist
from tfdist import _keras
from tfdist.errors import ArgumentError
from tfdist.step.flops import work_of
from tfdist.step.state import variables_of

L = keras.layers
pytestmark = pytest.mark.quick


def flops(model, x, y):
    return work_of(_keras.step_graph(model, x, y)).flops


def test_dense_layers():
    model = keras.Sequential([keras.Input((20,)), L.Dense(30), L.Dense(5)])
    model.compile("sgd", "mse")
    spec = tf.TensorSpec((7, 20)), tf.TensorSpec((7, 5))
    # Forward, and the gradients of kernels and inputs, but not of the model's input.
    assert flops(model, *spec) == 2 * 7 * (2 * 20 * 30 + 3 * 30 * 5)


def test_convolutions():
    model = keras.Sequential(
        [keras.Input((9, 9, 2)), L.Conv2D(4, 3), L.DepthwiseConv2D(2), L.Flatten(), L.Dense(1)]
    )
    model.compile("sgd", "mse")
    spec = tf.TensorSpec((5, 9, 9, 2)), tf.TensorSpec((5, 1))
    conv = 5 * 7 * 7 * 4 * (3 * 3 * 2)
    depthwise = 5 * 6 * 6 * 4 * (2 * 2)
    dense = 5 * 6 * 6 * 4
    assert flops(model, *spec) == 2 * (2 * conv + 3 * depthwise + 3 * dense)


def trained():
    model = keras.Sequential(
        [keras.Input((8,)), L.Dense(16), L.BatchNormalization(), L.Dropout(0.5), L.Dense(2)]
    )
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x = np.random.default_rng(0).normal(size=(60, 8)).astype("float32")
    y = np.arange(60) % 10 // 9
    model.fit(x, y, verbose=0)
    return model, x, y


def test_a_recommendation_changes_nothing():
    model, x, y = trained()
    before = [np.array(v.value) for v in variables_of(model)]
    state = np.random.get_state()[1].tolist()
    found = tfdist.recommend(model, x, y, batch_size=20)
    assert found.workload.measured_s
    assert found.workload.rows == 60
    assert (found.workload.classes, found.workload.class_ratio) == (2, 9.0)
    assert any("class_weight" in line for line in found.advice)
    assert np.random.get_state()[1].tolist() == state
    after = [np.array(v.value) for v in variables_of(model)]
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)


def test_weights_and_slots_are_those_of_the_model():
    model, x, y = trained()
    load = tfdist.recommend(model, x, y, batch_size=20, measure=False).workload
    assert load.weight_bytes == sum(np.array(v.value).nbytes for v in model.variables)
    slots = [np.array(v.value).nbytes for v in model.optimizer.variables]
    assert load.slot_bytes == sum(slots)
    assert load.gradient_bytes == sum(np.array(v).nbytes for v in model.trainable_weights)
    assert load.data_bytes == x.nbytes + y.nbytes
    assert not load.measured_s


def test_compression_is_refused_with_zero_as_fit_refuses_it():
    from tfdist.scripts.recommend import Where, recommend_call
    from tfdist.scripts.refusals import Call

    model, x, y = trained()
    call = Call(model, x, y, {"compression": "bf16"})
    found = recommend_call(call, Where(), measure=False)
    refused = {c.strategy: c.obstacle for c in found.candidates}
    assert "compression='bf16'" in refused["zero 1"]
    assert refused["multi_worker"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"workers": 0}, "workers=0"), ({"workers": 3, "hosts": 2}, "hosts=2"),
     ({"link": "fast"}, "link='fast'"), ({"batch_size": 0}, "batch_size=0")],
)  # fmt: skip
def test_bad_arguments_are_refused(arguments, message):
    model = keras.Sequential([keras.Input((4,)), L.Dense(1)])
    model.compile("sgd", "mse")
    with pytest.raises(ArgumentError, match=f"Received: .*{message}"):
        tfdist.recommend(model, **arguments)
