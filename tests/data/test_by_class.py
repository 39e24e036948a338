"""Datasets drawn from by class: exact shares, every example in turn, bounded memory."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfdist
from tests.data.test_reading import settings
from tfdist import data
from tfdist.data import DataPosition
from tfdist.errors import ArgumentError
from tfdist.samplers import ClassBalanced, Oversample, Stratified, Undersample, Uniform
from tfdist.strategies.base import Place

pytestmark = pytest.mark.quick
COUNTS = [150, 40, 10]
ORDER = np.random.default_rng(0).permutation(200)
X = np.arange(200, dtype="float32")[ORDER, None]
Y = np.repeat([0, 1, 2], COUNTS)[ORDER]
DATASET = tf.data.Dataset.from_tensor_slices((X, Y))


def part(number: int) -> Any:
    return DATASET.filter(lambda x, y: y == number)


KINDS = {
    "examples": lambda: DATASET,
    "batches": lambda: DATASET.batch(7),
    "one-hot": lambda: tf.data.Dataset.from_tensor_slices((X, np.eye(3)[Y])).batch(16),
    "dict": lambda: {number: part(number) for number in range(3)},
    "dict of batches": lambda: {number: part(number).batch(3) for number in range(3)},
    "no class kept": lambda: tfdist.ByClass(DATASET, buffer_size=0),
    "small classes kept": lambda: tfdist.ByClass(DATASET.batch(9), buffer_size=40),
}


def source(x: Any, sampler: Any, **changes: Any) -> Any:
    options = {"batch_size": 10, "sampler": sampler, "training": True, "seed": 3, **changes}
    return data.read(x, None, None, settings(**options))


def drawn(found: Any, steps: int, epoch: int = 0, skip: int = 0) -> tuple[Any, Any]:
    shares = list(found.shares(Place(), DataPosition(epoch, skip)).take(steps))
    assert len(shares) == steps
    assert all(len(share.data[0]) == 10 for share in shares)
    x, y = (np.concatenate([share.data[i] for share in shares]) for i in (0, 1))
    return x[:, 0], y if y.ndim == 1 else y.argmax(1)


@pytest.mark.parametrize("kind", KINDS)
def test_classes_come_alike_and_their_examples_in_turn(kind: str) -> None:
    found = source(KINDS[kind](), ClassBalanced())
    assert found.steps == 20
    x, y = drawn(found, 60)
    for epoch in range(3):
        counts = np.bincount(y[200 * epoch : 200 * epoch + 200])
        assert sorted(counts) == [66, 67, 67]
    for number, count in enumerate(COUNTS):
        expected = np.resize(X[number == Y, 0], (y == number).sum())
        np.testing.assert_array_equal(x[y == number], expected)
        assert len(np.unique(x[y == number])) == count
    # A resumed run goes on with the draws that would have come.
    later, _ = drawn(found, 3, epoch=2, skip=1)
    np.testing.assert_array_equal(later, x[410:440])


@pytest.mark.parametrize(
    ("sampler", "counts"),
    [
        (Undersample(), [10, 10, 10]),
        (Oversample(), [150, 150, 150]),
        (ClassBalanced(0.0), COUNTS),
    ],
)
def test_samplers_keep_their_meaning(sampler: Any, counts: list[int]) -> None:
    found = source(DATASET, sampler)
    assert found.steps == sum(counts) // 10
    assert np.bincount(drawn(found, found.steps)[1]).tolist() == counts


def test_an_epoch_ends_with_a_full_batch() -> None:
    found = source(DATASET, Undersample(), batch_size=8)
    shares = list(found.shares(Place()).take(4))
    assert found.steps == 4
    assert [len(share.data[1]) for share in shares] == [8] * 4


def test_replicas_take_slices() -> None:
    found = source(DATASET, ClassBalanced())
    whole, _ = drawn(found, 3)
    halves = [
        np.concatenate([s.data[0] for s in found.shares(Place(2, r)).take(3)])[:, 0]
        for r in range(2)
    ]
    for step in range(3):
        joined = np.concatenate([half[5 * step : 5 * step + 5] for half in halves])
        np.testing.assert_array_equal(joined, whole[10 * step : 10 * step + 10])


def test_workers_must_draw_alike() -> None:
    def fingerprint(dataset: Any, seed: int = 3) -> str:
        text: str = source(dataset, ClassBalanced(), seed=seed).fingerprint()
        return text

    assert fingerprint(DATASET) == fingerprint(DATASET)
    assert fingerprint(DATASET) != fingerprint(DATASET.take(199))
    assert fingerprint(DATASET) != fingerprint(DATASET, seed=4)


def test_an_endless_dataset_with_named_classes() -> None:
    endless = tfdist.ByClass(DATASET.repeat(), classes=[0, 2])
    found = source(endless, ClassBalanced(), steps=4)
    _, y = drawn(found, 8)
    assert np.bincount(y[:40]).tolist() == np.bincount(y[40:]).tolist() == [20, 0, 20]
    later, _ = drawn(found, 2, skip=4)
    np.testing.assert_array_equal(later, drawn(found, 6)[0][40:])


def test_a_class_that_does_not_come_in_time() -> None:
    endless = tfdist.ByClass(DATASET.repeat(), classes=[0, 7], limit=500)
    found = source(endless, ClassBalanced(), steps=4)
    with pytest.raises(tf.errors.InvalidArgumentError, match="no example of class 7"):
        drawn(found, 4)


def test_fit_trains_on_streams_and_weighs_classes() -> None:
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(3)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    scaled = DATASET.map(lambda x, y: (x / 200, y))
    options = {"sampler": Undersample(), "class_weight": {0: 2.0}, "batch_size": 10}
    history = tfdist.fit(model, scaled, epochs=2, verbose=0, seed=1, **options)
    assert model.optimizer.iterations == 6
    assert np.isfinite(history.history["loss"]).all()


SLICES = tf.data.Dataset.from_tensor_slices
WRONG: dict[str, tuple[Any, Any, str]] = {
    "sampler": (lambda: DATASET, Stratified(), "`sampler` must not be passed"),
    "dict, sampler": (lambda: {0: DATASET}, Uniform(), "must be ClassBalanced"),
    "labels": (lambda: DATASET, Undersample(labels=Y), "without labels"),
    "endless": (lambda: DATASET.repeat(), ClassBalanced(), "data that ends"),
    "endless part": (lambda: {0: DATASET.repeat()}, Undersample(), "is not counted"),
    "fractions": (lambda: SLICES((X, X[:, 0] / 3)), ClassBalanced(), "class numbers"),
    "several": (lambda: SLICES((X, np.ones((200, 3)))).batch(4), ClassBalanced(), "one-hot"),
    "negative": (lambda: SLICES((X, -Y)), ClassBalanced(), "from 0"),
    "no y": (lambda: SLICES(X), ClassBalanced(), "must yield \\(x, y\\)"),
    "weights": (lambda: SLICES((X, Y, X)), ClassBalanced(), "must yield \\(x, y\\)"),
    "empty": (lambda: DATASET.filter(lambda x, y: y > 9), ClassBalanced(), "at least one"),
    "empty part": (lambda: {0: DATASET, 5: part(5)}, ClassBalanced(), "class 5"),
    "no dataset": (lambda: tfdist.ByClass({}), ClassBalanced(), "dict of them"),
    "arrays": (lambda: tfdist.ByClass({0: X}), ClassBalanced(), "dict of them"),
    "buffer": (lambda: tfdist.ByClass(DATASET, -1), ClassBalanced(), "`buffer_size`"),
    "limit": (lambda: tfdist.ByClass(DATASET, limit=0), ClassBalanced(), "`limit`"),
    "classes": (lambda: tfdist.ByClass(DATASET, classes=[]), ClassBalanced(), "`classes`"),
}


@pytest.mark.parametrize("name", WRONG)
def test_refused(name: str) -> None:
    make, sampler, message = WRONG[name]
    with pytest.raises(ArgumentError, match=message):
        source(make(), sampler)


def test_a_dataset_that_is_not_counted_needs_equal_shares_and_a_length() -> None:
    endless = tfdist.ByClass(DATASET.repeat(), classes=[0, 1])
    for sampler, steps in ((ClassBalanced(0.5), 3), (ClassBalanced(), None)):
        with pytest.raises(ArgumentError, match="is not counted"):
            source(endless, sampler, steps=steps)
