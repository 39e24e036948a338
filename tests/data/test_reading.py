"""The data road: bounds, conversion, and shares that make up each global batch."""

from __future__ import annotations

import itertools
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfdist
from tfdist import data
from tfdist.data import DataPosition, columns
from tfdist.errors import ArgumentError
from tfdist.privacy import Poisson
from tfdist.samplers import (
    ClassBalanced,
    Oversample,
    Sequential,
    Stratified,
    Undersample,
    Uniform,
    Weighted,
)
from tfdist.strategies.base import Place
from tfdist.strategies.mesh import Mesh

pytestmark = pytest.mark.quick


def settings(**changes: Any) -> data.SourceSettings:
    values: dict[str, Any] = {
        "batch_size": None,
        "steps": None,
        "sampler": Sequential(),
        "shuffle": False,
        "seed": 0,
        "training": False,
    }
    return data.SourceSettings(**{**values, **changes})


@pytest.mark.parametrize("total", [1, 2, 3, 64, 65])
@pytest.mark.parametrize("replicas", [1, 2, 3, 4, 7])
def test_bounds_cover_the_batch_in_order(total: int, replicas: int) -> None:
    edges = [data.bounds(total, r, Place(replicas)) for r in range(replicas)]
    assert edges[0][0] == 0
    assert edges[-1][1] == total
    assert all(a[1] == b[0] for a, b in itertools.pairwise(edges))
    sizes = [end - begin for begin, end in edges]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("kind", ["arrays", "dataset"])
@pytest.mark.parametrize("replicas", [2, 3, 5])
def test_shares_make_up_each_global_batch(kind: str, replicas: int) -> None:
    x = np.arange(23, dtype="int64")[:, None]
    if kind == "arrays":
        source = data.read(x, x, None, settings(batch_size=4))
    else:
        dataset = tf.data.Dataset.from_tensor_slices((x, x)).batch(4)
        source = data.read(dataset, None, None, settings())
    assert source.steps == 6
    by_replica = [
        list(source.shares(Place(replicas, first_replica=r))) for r in range(replicas)
    ]
    for step, shares in enumerate(zip(*by_replica, strict=True)):
        size = min(4, 23 - 4 * step)
        assert all(int(s.total) == size and len(s.data[0]) >= 1 for s in shares)
        rows = np.concatenate([s.data[0][: int(s.rows)] for s in shares])[:, 0]
        np.testing.assert_array_equal(rows, np.arange(4 * step, 4 * step + size))
        offsets = np.cumsum([0, *(int(s.rows) for s in shares)])[:-1]
        assert [int(s.offset) for s in shares] == list(offsets)


def test_replicas_along_other_axes_get_equal_parts() -> None:
    x = np.arange(5)
    place = Place(4, 0, 4, mesh=Mesh((("data", 2), ("model", 2))))
    for given, size in ((x, 5), (tf.data.Dataset.from_tensor_slices(x).batch(5), None)):
        source = data.read(given, None, None, settings(batch_size=size))
        shares = list(source.shares(place).take(4))
        rows = [tf.nest.flatten(s.data)[0].numpy().tolist() for s in shares]
        assert rows == [[0, 1]] * 2 + [[2, 3, 4]] * 2
        assert [int(s.total) for s in shares] == [5] * 4


@pytest.mark.parametrize(
    ("rows", "sampler", "replicas", "expected"),
    [
        (24, Sequential(), 1, 8),
        (24, Uniform(), 4, 2),
        (24, Uniform(), 3, None),
        (23, Uniform(), 1, None),
        (24, ClassBalanced(), 1, None),
    ],
)
def test_shares_of_one_size_have_a_static_shape(
    rows: int, sampler: Any, replicas: int, expected: int | None
) -> None:
    x = np.arange(rows)
    place = Place(replicas, 0, replicas)
    sources = [data.read(x, x % 2, None, settings(batch_size=8, sampler=sampler))]
    if isinstance(sampler, Sequential | Uniform):
        dataset = tf.data.Dataset.from_tensor_slices((x, x)).batch(8, rows == 24)
        sources.append(data.read(dataset, None, None, settings()))
    for source in sources:
        shares = source.shares(place)
        assert [leaf.shape.as_list() for leaf in shares.element_spec.data] == [[expected]] * 2
        for share in shares.take(2):
            assert len(share.data[0]) == len(share.data[1]) == (expected or len(share.data[0]))


@pytest.mark.parametrize("rows", [24, 23])
def test_layers_see_the_shapes_that_keras_shows(rows: int) -> None:
    class Seen(keras.layers.Layer):
        def compute_output_shape(self, shape: Any) -> Any:
            return shape

        def call(self, x: Any) -> Any:
            seen.add(tuple(x.shape))
            return x + 0.0

    seen: set[Any] = set()
    model = keras.Sequential([keras.Input((3,)), Seen()])
    x, found = np.ones((rows, 3), "float32"), []
    for evaluate in (keras.Model.evaluate, tfdist.evaluate):
        model.compile(loss="mse")
        seen.clear()
        evaluate(model, x, x, batch_size=8, verbose=0)
        found.append(set(seen))
    assert found == [{(8, 3) if rows == 24 else (None, 3)}] * 2


class One(keras.utils.PyDataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, page: int) -> Any:
        return np.arange(10), np.arange(10)


def test_only_a_users_dataset_may_be_tuned() -> None:
    rows = np.arange(10.0)
    for x in (rows, (rows for _ in range(2)), One()):
        source = data.read(x, None, None, settings(batch_size=5 if x is rows else None))
        for place in (Place(), Place(2, 0, 2)):
            assert source.shares(place).options().autotune.enabled is False
    dataset = tf.data.Dataset.from_tensors(rows)
    source = data.read(dataset, None, None, settings())
    assert source.shares(Place()).options().autotune.enabled is None


@pytest.mark.parametrize("replicas", [1, 2])
def test_private_shares_come_in_few_sizes(replicas: int) -> None:
    x = np.arange(1000)
    made = settings(batch_size=50, sampler=Poisson(), private=True, training=True)
    source = data.read(x, x, None, made)
    sizes, drawn = set(), [np.zeros(0, np.int64)] * 40
    for replica in range(replicas):
        place = Place(replicas, first_replica=replica)
        for step, share in enumerate(source.shares(place).take(40)):
            sizes.add(len(share.data[0]))
            drawn[step] = np.concatenate([drawn[step], share.data[0][: int(share.rows)]])
    assert len(sizes) <= 6
    assert all(size % 8 == 0 for size in sizes)  # 8: about the deviation of 50 rows' number
    for step, rows in enumerate(drawn):
        expected = Poisson().rows(step, num_rows=1000, batch_size=50, seed=0)
        np.testing.assert_array_equal(rows, expected)


def test_local_replicas_take_turns() -> None:
    x = np.arange(10)
    source = data.read(x, x, None, settings(batch_size=5))
    both = [int(s.offset) for s in source.shares(Place(2, 0, 2))]
    assert both == [0, 2, 0, 2]


def test_training_stream_goes_through_epochs() -> None:
    x = np.arange(10)
    source = data.read(x, x, None, settings(batch_size=5, sampler=Uniform(), training=True))
    first = [s.data[0].numpy() for s in source.shares(Place()).take(4)]
    later = [s.data[0].numpy() for s in source.shares(Place(), DataPosition(1)).take(2)]
    np.testing.assert_array_equal(first[2:], later)


def test_floats_become_floatx_and_nesting_stays() -> None:
    nested = {"a": [np.ones((2, 3)), np.ones(2, "int32")], "b": tf.ones((2,), tf.float64)}
    tensors = columns.to_tensors(nested, "x")
    assert tensors["a"][0].dtype == tf.float32
    assert tensors["a"][1].dtype == tf.int32
    assert tensors["b"].dtype == tf.float32


@pytest.mark.parametrize("bad", [3, "text", [1.0, 2.0], {"a": None}])
def test_what_is_no_array_is_named(bad: Any) -> None:
    with pytest.raises(ArgumentError, match="x"):
        columns.to_tensors(bad, "x")


def test_check_differs_when_batches_differ() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(200, 8, 5)).astype("float32")
    texts = np.full((200, 8), "text")
    dataset = tf.data.Dataset.from_tensor_slices((rows, texts))
    source = data.read(dataset, None, None, settings(batch_size=None))
    places = [Place(2, worker, 1, 2, worker) for worker in range(2)]
    checks, others = (
        np.array([share.check.numpy() for share in source.shares(place)]) for place in places
    )
    assert (checks == others).all()  # of the global batch, so alike on all workers
    assert len({tuple(check) for check in checks}) == 200
    assert ((checks >= 0) & (checks < 64) & (checks == checks.round())).all()


def test_fingerprint_sees_values_and_shapes() -> None:
    x = np.arange(1000.0)
    same = data.read(x, x, None, settings()).fingerprint()
    assert same == data.read(x.copy(), x, None, settings()).fingerprint()
    assert same != data.read(x + 1, x, None, settings()).fingerprint()
    assert same != data.read(x[:999], x[:999], None, settings()).fingerprint()


def test_fingerprint_sees_the_sampler_and_its_labels() -> None:
    x = np.arange(1000)
    prints = {
        data.read(x, x % 7, None, settings(sampler=sampler)).fingerprint()
        for sampler in (Sequential(), Uniform(), ClassBalanced(), ClassBalanced(labels=x % 5))
    }
    assert len(prints) == 4


def test_sampler_takes_classes_from_y() -> None:
    x = np.arange(300)
    y = (x % 30 == 0).astype("float32")
    one_hot = np.eye(2, dtype="int32")[y.astype(int)]
    streams = [
        data.read(x, targets, None, settings(sampler=sampler, batch_size=50, training=True))
        for targets, sampler in (
            (y, ClassBalanced()),
            (y[:, None], ClassBalanced()),
            (one_hot, ClassBalanced()),
            ({"a": x, "b": y}, ClassBalanced(labels=y)),
            (None, ClassBalanced(labels=y)),
        )
    ]
    drawn = [
        np.concatenate(
            [
                tf.nest.flatten(s.data)[0]
                for s in source.shares(Place(), DataPosition(2)).take(6)
            ]
        )
        for source in streams
    ]
    assert (drawn[0] % 30 == 0).sum() == 150
    for other in drawn[1:]:
        np.testing.assert_array_equal(other, drawn[0])


@pytest.mark.parametrize(
    ("y", "sampler", "message"),
    [
        (None, ClassBalanced(), "neither y nor labels"),
        ({"a": np.zeros(10), "b": np.zeros(10)}, Stratified(), "one array"),
        (np.linspace(0, 1, 10), Oversample(), "fractions"),
        (np.array([0.0, np.nan] * 5), Oversample(), "NaN"),
        (np.full((10, 2), 0.5), Oversample(), "zeros and ones"),
        (np.zeros(10), Undersample(np.zeros(9)), "9 labels or weights, and data with 10"),
        (None, Weighted(np.ones(11)), "11 labels or weights, and data with 10"),
    ],
)
def test_samplers_refuse_what_they_cannot_use(y: Any, sampler: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        data.read(np.zeros(10), y, None, settings(sampler=sampler))


def test_most_samplers_need_arrays() -> None:
    dataset = tf.data.Dataset.from_tensor_slices((np.zeros(10), np.zeros(10))).batch(5)
    with pytest.raises(ArgumentError, match="Stratified"):
        data.read(dataset, None, None, settings(sampler=Stratified()))
