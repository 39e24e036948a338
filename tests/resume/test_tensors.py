"""What replicas have of their own, saved by some and restored by any number."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies.devices import Devices
from tfdist.errors import CheckpointError
from tfdist.resume.checkpoint import shards, tensors
from tfdist.resume.checkpoint.shards import TensorReader, merge, write_for_chief, write_shard
from tfdist.resume.checkpoint.slices import slices_of_run
from tfdist.sharding.cuts import Cut
from tfdist.step.state import Role, Sharded, TrainState
from tfdist.strategies.base import Place

pytestmark = pytest.mark.quick


def saved(folder: Path, state: TrainState, values: Any) -> TensorReader:
    """Saves with one process for each replica; the chief merges."""
    written = []
    for number, value in enumerate(values):
        place = Place(len(values), number, 1, len(values), number)
        pieces = tensors.take(Devices(1, [value], place), state)
        shard = write_shard(folder, number, pieces)
        written += [shard] if shard is not None else []
    merge(folder, written)
    return TensorReader(folder)


def put_back(replicas: int, state: TrainState, reader: TensorReader) -> Any:
    now = Devices(replicas)
    tensors.put_back(now, state, reader, has_global_seed=False)
    return now.values


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_what_replicas_have_not_sent_is_dealt_out_to_any_number(replicas, tmp_path):
    kept = np.random.default_rng(0).normal(size=(2, 5, 3)).astype("float32")
    variable = keras.Variable(kept[0], trainable=False)
    state = TrainState((), ((variable, Role.PER_REPLICA),))
    values = put_back(replicas, state, saved(tmp_path, state, kept))
    assert values.shape == (replicas, 5, 3)
    np.testing.assert_allclose(values.sum(0), kept.sum(0), rtol=1e-5)
    if replicas == 2:
        np.testing.assert_array_equal(values, kept)


@pytest.mark.parametrize(("replicas", "rows"), [(1, 7), (2, 4), (3, 3)])
def test_a_sharded_tensor_is_cut_for_any_number(replicas, rows, tmp_path):
    whole = np.random.default_rng(0).normal(size=(7, 2)).astype("float32")
    padded = np.concatenate([whole, np.zeros((1, 2), "float32")]).reshape(2, 4, 2)
    part = keras.Variable(padded[0], trainable=False)
    reader = saved(tmp_path, TrainState((), ((part, Sharded(7)),)), padded)
    np.testing.assert_array_equal(reader.whole("sharded/0"), whole)
    part = keras.Variable(np.zeros((rows, 2)), trainable=False)
    values = put_back(replicas, TrainState((), ((part, Sharded(7)),)), reader)
    assert values.shape == (replicas, rows, 2)
    np.testing.assert_array_equal(values.reshape(-1, 2)[:7], whole)
    assert not values.reshape(-1, 2)[7:].any()


# Cut between elements, between rows, with slices in the middle of a row, and parts of padding.
@pytest.mark.parametrize("shape", [(7, 5), (100, 3), (3, 2, 5), (3,)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_variable_in_parts_is_saved_in_slices_for_any_number(shape, dtype, tmp_path):
    def in_parts(number, values):
        cut = Cut(shape, number)
        parts = [cut.own(values, i) for i in range(number)]
        part = keras.Variable(parts[0], dtype=dtype, trainable=False)
        return TrainState((part,), (), ((part, cut.role),)), parts, cut

    values = np.random.default_rng(0).normal(size=shape).astype("float32")
    whole = tf.cast(values, dtype)
    state, parts, _ = in_parts(2, whole)
    assert not state.is_everywhere
    assert state.replicated == ()
    reader = saved(tmp_path, state, parts)
    assert {file.name for file in tmp_path.iterdir()} == {
        "tensors.index", "tensors.data-00000-of-00002", "tensors.data-00001-of-00002"
    }  # fmt: skip
    # TensorFlow's own tools see whole tensors, and nothing of slices.
    prefix = str(tmp_path / "tensors")
    assert tf.train.list_variables(prefix) == [("variables/0", list(shape))]
    found = tf.train.load_checkpoint(prefix).get_tensor("variables/0")
    np.testing.assert_array_equal(found, whole)
    variable = keras.Variable(np.zeros(shape), dtype=dtype)
    put_back(1, TrainState((variable,)), reader)
    np.testing.assert_array_equal(np.asarray(variable), whole)
    for replicas in (2, 3, 5):
        state, _, cut = in_parts(replicas, tf.zeros_like(whole))
        found = cut.joined_arrays(put_back(replicas, state, reader))
        np.testing.assert_array_equal(found, whole)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_slices_are_a_run_of_elements_in_their_order(shape, data):
    size = math.prod(shape)
    begin = data.draw(st.integers(0, size))
    end = data.draw(st.integers(begin, size))
    numbers = np.arange(size).reshape(shape)
    slices = slices_of_run(tuple(shape), begin, end)
    found = [
        numbers[tuple(slice(at, at + n) for at, n in zip(one.begin, one.sizes, strict=True))]
        for one in slices
    ]
    flat = np.concatenate([np.empty(0, int), *(part.ravel() for part in found)])
    np.testing.assert_array_equal(flat, np.arange(begin, end))
    assert len(slices) <= 2 * len(shape) - 1


def test_a_slice_that_is_not_there_is_named(tmp_path):
    cut = Cut((7, 5), 2)
    part = keras.Variable(np.ones(18), trainable=False)
    state = TrainState((part,), (), ((part, cut.role),))
    place = Place(2, 0, 1, 2, 0)
    merge(tmp_path, [write_shard(tmp_path, 0, tensors.take(Devices(1, [part], place), state))])
    reader = TensorReader(tmp_path)
    with pytest.raises(CheckpointError, match=r"'variables/0' in .* is missing or damaged"):
        reader.whole("variables/0")
    with pytest.raises(CheckpointError, match=r"'variables/0' in .* is missing or damaged"):
        put_back(2, state, reader)


def test_the_chief_waits_for_the_others_and_hears_of_failures(tmp_path, monkeypatch):
    piece = shards.Piece("a", tf.ones(3))
    write_for_chief(tmp_path / "one", 1, [piece])
    write_for_chief(tmp_path / "one", 2, [])
    (shard,) = shards.of_others(tmp_path / "one", [1, 2])
    assert shard.name == "shard-00001"
    monkeypatch.setattr(shards, "_GIVEN_UP_AFTER_S", 0.0)
    with pytest.raises(CheckpointError, match="nothing from process 3"):
        shards.of_others(tmp_path / "one", [3], lambda: True)
    monkeypatch.setenv("TFDIST_STEP_TIMEOUT", "0.01")
    with pytest.raises(CheckpointError, match="nothing from process 3"):
        shards.of_others(tmp_path / "one", [3])

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "write_shard", full)
    with pytest.raises(CheckpointError, match="No space left on device in process 1"):
        write_for_chief(tmp_path / "two", 1, [piece])
    with pytest.raises(OSError, match="No space left on device in process 1"):
        shards.of_others(tmp_path / "two", [1])


def test_who_has_what_is_asked_of_the_state():
    one, two, three = (keras.Variable(float(n)) for n in range(3))
    state = TrainState((one,), ((two, Role.REPLICATED),))
    assert state.is_everywhere
    for role in (Role.PER_REPLICA, Sharded(1)):
        state = TrainState((one,), ((two, Role.REPLICATED), (three, role)))
        assert state.replicated == (one, two)
        assert not state.is_everywhere
        assert state.sharded == (((three, role),) if isinstance(role, Sharded) else ())
