"""What every strategy must do by itself: the pieces that `fit` is made of.

Each replica contributes something else, so that the right answers are sums and lists that are
known beforehand.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import keras
import numpy as np
import tensorflow as tf

import tfdist
from tests.behaviour.registry import (
    EVERYWHERE,
    MIRRORED,
    MIRRORED_4,
    MULTI_WORKER,
    REPLICAS,
    WORKERS,
    check,
)
from tfdist.resume.checkpoint import tensors
from tfdist.resume.checkpoint.shards import TensorReader, merge, write_shard
from tfdist.step.state import Role, Sharded, TrainState
from tfdist.strategies import connected, tf_distribute
from tfdist.strategies.mesh import Mesh

MORE = ("multi_worker-3",)
FULL = ("horovod-3", "mirrored-4")
TYPES = (tf.float32, tf.float64, tf.int32, tf.int64, tf.float16)


def strategy() -> Any:
    return tfdist.strategies.session.current().strategy


def on_replicas(function: Any) -> Any:
    """Runs a function on all replicas, traced, as `fit` does."""
    return tf.function(lambda: strategy().run(function), autograph=False)()


def tensor(replica: Any, position: int) -> Any:
    """What a replica contributes at a position of a list: dense or rows, of some type."""
    dtype = TYPES[position % len(TYPES)]
    value = tf.cast(tf.reshape(tf.range(6), [3, 2]) * (position + 1), dtype)
    value *= tf.cast(replica + 1, dtype)
    if position % 4 == 1 or position in (2, 3, 14, 19):  # the numbers of TensorFlow's types
        rows = tf.constant([4, 0, 4])
        return tf.IndexedSlices(value, rows, tf.constant([5, 2]))
    return value


def dense(value: Any) -> Any:
    return tf.convert_to_tensor(value)


@check(*EVERYWHERE, *MORE, full=FULL)
def sums_are_of_all_replicas(folder: Path) -> None:
    sum_up_tensors()


@check(MULTI_WORKER, full=(MIRRORED, "multi_worker-3"))
def sums_in_several_packs_are_of_all_replicas(folder: Path) -> None:
    with mock.patch.object(tf_distribute, "PACK_BYTES", 40):  # of tensors of 12 to 48 bytes
        sum_up_tensors()


def sum_up_tensors() -> None:
    replicas = strategy().place.num_replicas

    def sum_up() -> Any:
        replica = strategy().replica_id()
        summed = strategy().all_reduce_sum([tensor(replica, i) for i in range(20)])
        sizes = [tf.cast(tf.reshape(dense(value), [1, -1]), tf.float32) for value in summed]
        return summed, strategy().all_gather(tf.concat(sizes, 1))

    summed, on_each = on_replicas(sum_up)
    times = sum(range(1, replicas + 1))
    for position, received in enumerate(summed):
        one = tensor(0, position)
        assert isinstance(received, tf.IndexedSlices) == isinstance(one, tf.IndexedSlices)
        assert received.dtype == one.dtype
        np.testing.assert_array_equal(dense(received), dense(one) * times)
    rows = np.asarray(on_each)
    assert len(rows) == replicas
    assert (rows == rows[0]).all()


@check(*EVERYWHERE, *MORE, full=FULL)
def rows_are_gathered_in_the_order_of_replicas(folder: Path) -> None:
    replicas = strategy().place.num_replicas

    def gather() -> Any:
        replica = tf.cast(strategy().replica_id(), tf.int32)
        rows = tf.fill([replica, 2], tf.cast(replica, tf.float32))  # none of the first one
        return strategy().all_gather(rows), strategy().all_gather(replica[None])

    rows, numbers = on_replicas(gather)
    expected = np.repeat(np.arange(replicas), np.arange(replicas))
    np.testing.assert_array_equal(rows, np.stack([expected] * 2, 1))
    np.testing.assert_array_equal(numbers, np.arange(replicas))


@check(*EVERYWHERE, *MORE, MIRRORED_4, full=("horovod-3",))
def sums_and_rows_are_of_the_group_along_an_axis(folder: Path) -> None:
    place = strategy().place
    replicas = place.num_replicas
    is_grid = replicas == 4
    axes = (("data", 2), ("model", 2)) if is_grid else (("data", replicas),)
    groups = [[(0, 2), (1, 3)], [(0, 1), (2, 3)]] if is_grid else [[range(replicas)]]

    def along(zero: Any) -> Any:  # known when it runs: constants would be folded on Horovod
        replica = tf.cast(strategy().replica_id(), tf.float32) + zero
        reports = []
        for (axis, _), of_axis in zip(axes, groups, strict=True):
            slices = tf.IndexedSlices(replica[None], tf.constant([1]), tf.constant([3]))
            tensors = [tf.fill([1], 10.0**replica), slices]
            rows = tf.fill([tf.cast(replica, tf.int32)], replica)  # none of the first one
            for sums, gathered in (
                (strategy().sum_along(axis, tensors), strategy().gather_along(axis, rows)),
                (
                    strategy().sum_in_groups(of_axis, tensors),
                    strategy().gather_in_groups(of_axis, rows),
                ),
            ):
                report = tf.concat([sums[0], dense(sums[1]), gathered], 0)
                reports.append(tf.pad(report, [[0, 10 - tf.size(report)]]))
        assert strategy().sum_along("pipe", tensors)[0] is tensors[0]
        return strategy().all_gather(tf.stack(reports)[None])

    with mock.patch.object(strategy(), "place", replace(place, mesh=Mesh(axes))):
        traced = tf.function(lambda zero: strategy().run(along, zero), autograph=False)
        received = traced(tf.constant(0.0)).numpy()
    for replica in range(replicas):
        expected = []
        for of_axis in groups:
            (group,) = (group for group in of_axis if replica in group)
            rows = [float(member) for member in group for _ in range(member)]
            report = [sum(10.0**member for member in group), 0, sum(group), 0, *rows]
            expected += [[*report, *[0] * (10 - len(report))]] * 2
        np.testing.assert_array_equal(received[replica], expected)


@check(*EVERYWHERE, *MORE, full=FULL)
def shares_are_dealt_out_in_order(folder: Path) -> None:
    place = strategy().place
    numbers = [
        step * place.num_replicas + place.first_replica + local
        for step in range(3)
        for local in range(place.local_replicas)
    ]
    shares = strategy().distribute(lambda: tf.data.Dataset.from_tensor_slices(numbers))
    iterator = iter(shares)

    @tf.function(autograph=False)
    def step(iterator: Any) -> Any:
        share = strategy().next_share(iterator)
        return strategy().run(lambda number: strategy().all_gather(number[None]), share)

    received = np.concatenate([step(iterator) for _ in range(3)])
    np.testing.assert_array_equal(received, np.arange(3 * place.num_replicas))


@check(*REPLICAS, *MORE, full=FULL)
def each_replica_has_variables_of_its_own_while_they_are_held(folder: Path) -> None:
    place = strategy().place
    variable = keras.Variable([1.0, 2.0])
    plain = variable.value

    def count() -> Any:
        variable.assign(variable + tf.cast(strategy().replica_id() + 1, tf.float32))
        return variable.value

    held = strategy().hold([variable], [])
    for time in (1, 2):  # it can be entered again
        with held:
            on_replicas(count)
            copies = strategy().copies(variable)
        changes = np.arange(place.local_replicas) + place.first_replica + 1
        if time == 2:  # the first replica's came back, and went to all
            changes += changes[0]
        np.testing.assert_array_equal(copies, np.stack([1.0 + changes, 2.0 + changes], 1))
        np.testing.assert_array_equal(variable, copies[0])
        assert variable.value is plain


@check(*REPLICAS, *MORE, full=FULL)
def what_replicas_have_of_their_own_is_saved_and_restored(folder: Path) -> None:
    place = strategy().place
    rows = 2 * place.num_replicas - 1  # a row of padding
    whole = np.arange(3.0 * rows, dtype="float32").reshape(rows, 3)
    padded = np.concatenate([whole, np.zeros((1, 3), "float32")])
    parts = np.split(padded, place.num_replicas)
    local = range(place.first_replica, place.first_replica + place.local_replicas)
    of_role = [keras.Variable(np.zeros((2, 3)), trainable=False) for _ in range(2)]
    roles = (Sharded(rows), Role.PER_REPLICA)
    state = TrainState((), tuple(zip(of_role, roles, strict=True)))
    with strategy().hold(of_role, []):
        for variable in of_role:
            strategy().assign_copies(variable, [parts[r] for r in local])
        own = write_shard(folder, place.worker_index, tensors.take(strategy(), state))
        written = strategy().gather_objects(own)
        if place.is_chief:
            merge(folder, written)
        strategy().gather_objects(None)
        reader = TensorReader(folder)
        np.testing.assert_array_equal(reader.whole("sharded/0"), whole)
        np.testing.assert_array_equal(reader.whole("per_replica/0"), parts)
        # The chief gets the same if the others cannot write.
        sent = [piece for part in tensors.of_others(strategy(), state) for piece in part]
        names = [(piece.name, piece.slice.spec) for piece in sent]
        others = range(place.local_replicas, place.num_replicas) if place.is_chief else ()
        assert len(set(names)) == len(names) == 2 * len(others)
        for piece in sent:
            axes = zip(piece.slice.begin, piece.slice.sizes, strict=True)
            expected = reader.whole(piece.name)[tuple(slice(b, b + n) for b, n in axes)]
            np.testing.assert_array_equal(piece.tensor, expected)
        for is_shared in (True, False):
            for variable in of_role:
                strategy().assign_copies(variable, [np.zeros((2, 3))] * len(local))
            here = reader if is_shared or place.is_chief else None
            tensors.put_back(strategy(), state, here, False, is_shared)
            for variable in of_role:
                np.testing.assert_array_equal(
                    strategy().copies(variable), [parts[r] for r in local]
                )


@check(*WORKERS, "multi_worker-3", full=FULL)
def workers_take_the_chief_s_bits(folder: Path) -> None:
    me = strategy().place.worker_index
    values = [
        np.array([np.nan, -0.0, np.inf, 1e-45], "float32"),
        np.arange(5, dtype="int64") << 40,
        np.array(True),
        np.zeros([0, 3], "float16"),
        np.arange(3, dtype="float64") / 3,
    ]
    variables = [
        keras.Variable(np.zeros_like(value) if me else value, dtype=value.dtype.name)
        for value in values
    ]
    for _ in range(2):  # the second time they are equal already
        with mock.patch.object(connected, "BYTES_SENT", 20):  # several groups
            strategy().agree(variables)
        for variable, value in zip(variables, values, strict=True):
            assert np.asarray(variable).tobytes() == value.tobytes()


@check(*WORKERS, "multi_worker-3", full=FULL)
def objects_come_from_all_workers(folder: Path) -> None:
    place = strategy().place
    mine = {"worker": place.worker_index, "text": "ü" * 1000 * place.worker_index}
    found = strategy().gather_objects(mine)
    assert [one["worker"] for one in found] == list(range(place.num_workers))
    assert [len(one["text"]) for one in found] == [1000 * i for i in range(place.num_workers)]
    assert strategy().broadcast_object(mine) == found[0]
