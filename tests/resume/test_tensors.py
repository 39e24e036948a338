"""What replicas have of their own, saved by some and restored by any number."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from tests.strategies.devices import Devices
from tfdist.resume.checkpoint import tensors
from tfdist.sharding.cuts import Cut
from tfdist.step.state import Role, Sharded, TrainState

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_what_replicas_have_not_sent_is_dealt_out_to_any_number(replicas):
    kept = np.random.default_rng(0).normal(size=(2, 5, 3)).astype("float32")
    variable = keras.Variable(kept[0], trainable=False)
    state = TrainState((), ((variable, Role.PER_REPLICA),))
    saved = tensors.take(Devices(2, kept), state)
    now = Devices(replicas)
    tensors.put_back(now, state, lambda name: saved[name].numpy(), has_global_seed=False)
    assert now.values.shape == (replicas, 5, 3)
    np.testing.assert_allclose(now.values.sum(0), kept.sum(0), rtol=1e-5)
    if replicas == 2:
        np.testing.assert_array_equal(now.values, kept)


@pytest.mark.parametrize(("replicas", "rows"), [(1, 7), (2, 4), (3, 3)])
def test_a_sharded_tensor_is_cut_for_any_number(replicas, rows):
    whole = np.random.default_rng(0).normal(size=(7, 2)).astype("float32")
    padded = np.concatenate([whole, np.zeros((1, 2), "float32")]).reshape(2, 4, 2)
    part = keras.Variable(padded[0], trainable=False)
    state = TrainState((), ((part, Sharded(7)),))
    saved = tensors.take(Devices(2, padded), state)
    np.testing.assert_array_equal(saved["sharded/0"], whole)
    part = keras.Variable(np.zeros((rows, 2)), trainable=False)
    state = TrainState((), ((part, Sharded(7)),))
    now = Devices(replicas)
    tensors.put_back(now, state, lambda name: saved[name].numpy(), has_global_seed=False)
    assert now.values.shape == (replicas, rows, 2)
    np.testing.assert_array_equal(now.values.reshape(-1, 2)[:7], whole)
    assert not now.values.reshape(-1, 2)[7:].any()


@pytest.mark.parametrize("shape", [(7, 5), (100, 3)])  # cut between elements, between rows
@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_a_variable_in_parts_is_saved_whole_and_cut_for_any_number(replicas, shape):
    def in_parts(number, values):
        cut = Cut(shape, number)
        parts = [cut.own(values, i).numpy() for i in range(number)]
        part = keras.Variable(parts[0], trainable=False)
        return TrainState((part,), (), ((part, cut.role),)), Devices(number, parts), cut

    whole = np.random.default_rng(0).normal(size=shape).astype("float32")
    state, before, _ = in_parts(2, whole)
    saved = tensors.take(before, state)
    np.testing.assert_array_equal(saved["variables/0"], whole)
    assert not state.is_everywhere
    assert state.replicated == ()
    if replicas == 1:  # and without parts
        variable = keras.Variable(np.zeros(shape, "float32"))
        state, now = TrainState((variable,)), Devices(1)
    else:
        state, now, cut = in_parts(replicas, np.zeros(shape, "float32"))
    tensors.put_back(now, state, lambda name: saved[name].numpy(), has_global_seed=False)
    found = variable.numpy() if replicas == 1 else cut.joined_arrays(now.values)
    np.testing.assert_array_equal(found, whole)


def test_who_has_what_is_asked_of_the_state():
    one, two, three = (keras.Variable(float(n)) for n in range(3))
    state = TrainState((one,), ((two, Role.REPLICATED),))
    assert state.is_everywhere
    for role in (Role.PER_REPLICA, Sharded(1)):
        state = TrainState((one,), ((two, Role.REPLICATED), (three, role)))
        assert state.replicated == (one, two)
        assert not state.is_everywhere
        assert state.sharded == (((three, role),) if isinstance(role, Sharded) else ())
