"""Augmentation: the same for any number of replicas, of the chosen examples only."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfdist
from tests.data.test_reading import settings
from tfdist import data
from tfdist._keras import draws
from tfdist.data import DataPosition
from tfdist.errors import ArgumentError
from tfdist.samplers import ClassBalanced, Undersample, Uniform, Weighted
from tfdist.strategies.base import Place

L = keras.layers
RNG = np.random.default_rng(0)
IMAGES = RNG.random((10, 16, 16, 3), dtype=np.float32)
BY_ROW = {
    "flip": lambda: L.RandomFlip(),
    "rotation": lambda: L.RandomRotation(0.2),
    "translation": lambda: L.RandomTranslation(0.2, 0.2),
    "zoom": lambda: L.RandomZoom(0.3),
    "contrast": lambda: L.RandomContrast(0.5),
    "jitter": lambda: L.RandomColorJitter((0, 1), 0.3, 0.3, 0.3, 0.3),
    "noise": lambda: L.GaussianNoise(0.1),
    "erasing": lambda: L.RandomErasing(1.0),  # draws normal noise
    "posterization": lambda: keras.Sequential([L.Rescaling(0.5), L.RandomFlip()]),
}
ONE_BY_ONE = {
    "crop": lambda: L.RandomCrop(12, 12),
    "dropout": lambda: L.Dropout(0.4),
    "aug_mix": lambda: L.AugMix((0, 1)),
}


def transforming(layer: Any) -> Any:
    spec = tf.TensorSpec((None, 16, 16, 3), tf.float32)
    draws.transformed(layer, spec)
    by_row = draws.draws_by_row(layer, spec)

    @tf.function
    def transformed(batch: Any, first: Any, chosen: Any) -> Any:
        seed, count = tf.constant([3, 4], tf.int64), tf.shape(batch, tf.int64)[0]
        rows = draws.TransformedRows(seed, tf.cast(first, tf.int64), count, chosen)
        return draws.transform(layer, tf.gather(batch, chosen), rows, by_row)

    return by_row, lambda batch, first, chosen: transformed(
        tf.constant(batch), tf.constant(first), tf.constant(chosen, tf.int64)
    ).numpy()


@pytest.mark.parametrize("name", [*BY_ROW, *ONE_BY_ONE])
def test_an_example_depends_on_its_place_alone(name: str) -> None:
    layer = (BY_ROW | ONE_BY_ONE)[name]()
    by_row, transform = transforming(layer)
    assert by_row == (name in BY_ROW)
    whole = transform(IMAGES, 0, range(10))
    # Sines of a vector may differ in the last digit from those of a shorter one.
    np.testing.assert_allclose(transform(IMAGES[3:8], 3, range(5)), whole[3:8], atol=1e-5)
    np.testing.assert_allclose(transform(IMAGES[3:8], 3, [1, 4]), whole[[4, 7]], atol=1e-5)
    alike = transform(np.repeat(IMAGES[:1], 10, 0), 0, range(10))
    assert len(np.unique(alike.reshape(10, -1), axis=0)) > 1  # examples' own numbers


@pytest.mark.quick
def test_numbers_are_uniform_and_independent_of_other_draws() -> None:
    class Shifted(keras.Layer):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.seed_generator = keras.random.SeedGenerator(1)

        def call(self, x: Any) -> Any:
            shape = (tf.shape(x)[0], 1)
            whole = keras.random.randint(shape, 3, 7, seed=self.seed_generator)
            part = keras.random.uniform(shape, 0.0, 1.0, seed=self.seed_generator)
            tail = keras.random.normal(shape, 2.0, 3.0, seed=self.seed_generator)
            return tf.concat([tf.cast(whole, tf.float32), part, tail], 1)

    layer, spec = Shifted(), tf.TensorSpec((None, 1), tf.float32)
    draws.transformed(layer, spec)
    assert draws.draws_by_row(layer, spec)
    count = tf.constant(20_000, tf.int64)
    rows = draws.TransformedRows(
        tf.constant([1, 2], tf.int64), 0 * count, count, tf.range(count)
    )
    whole, part, tail = draws.transform(layer, tf.zeros((20_000, 1)), rows, True).numpy().T
    np.testing.assert_allclose(np.bincount(whole.astype(int)), [0, 0, 0, *[5000] * 4], atol=300)
    np.testing.assert_allclose(np.histogram(part, 10, (0, 1))[0], [2000] * 10, atol=250)
    np.testing.assert_allclose([tail.mean(), tail.std()], [2, 3], atol=0.1)
    assert abs(np.corrcoef([whole, part, tail]) - np.eye(3)).max() < 0.03


def shares(augment: Any, x: Any, y: Any, place: Place | None = None, **changes: Any) -> Any:
    options = {"batch_size": 7, "sampler": Uniform(), "training": True, "seed": 5, **changes}
    epoch, skip = options.pop("epoch", 0), options.pop("skip", 0)
    source = data.read(x, y, None, settings(augment=augment, **options))
    return source, source.shares(place or Place(), DataPosition(epoch, skip))


def examples(stream: Any, steps: int) -> Any:
    """Joins x of some shares, without padding."""
    parts = [(s.data[0].numpy(), s.rows) for s in stream.take(steps)]
    return np.concatenate([x if rows is None else x[: int(rows)] for x, rows in parts])


@pytest.mark.parametrize("replicas", [2, 3])
def test_replicas_make_up_the_batches_of_one(replicas: int) -> None:
    y = np.arange(10)
    layers = [L.RandomRotation(0.3), L.RandomCrop(12, 12)]
    _, stream = shares(tfdist.Augment(layers), IMAGES, y)
    expected = examples(stream, 4)
    assert expected.shape == (20, 12, 12, 3)
    _, stream = shares(tfdist.Augment(layers), IMAGES, y, Place(replicas, 0, replicas))
    np.testing.assert_allclose(examples(stream, 4 * replicas), expected, atol=1e-5)
    # Resumed in the second epoch, after one step of it.
    _, stream = shares(tfdist.Augment(layers), IMAGES, y, epoch=1, skip=1)
    np.testing.assert_allclose(examples(stream, 1), expected[17:], atol=1e-5)


def test_an_epoch_of_unknown_length_and_a_second_one_differ() -> None:
    dataset = tf.data.Dataset.from_tensor_slices((IMAGES, np.arange(10))).batch(5)
    dataset = dataset.filter(lambda *_: True)
    augment = tfdist.Augment(L.GaussianNoise(0.1))
    source = data.read(dataset, None, None, settings(augment=augment, training=True))
    first, again, second = (
        examples(source.shares(Place(), DataPosition(e)), 2) for e in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != second).mean() > 0.9


@pytest.mark.parametrize("kind", ["numbers", "columns", "text"])
def test_only_chosen_classes_change(kind: str) -> None:
    numbers = np.arange(10) % 3
    y = {
        "numbers": numbers,
        "columns": np.eye(3)[numbers],
        "text": np.array(["a", "b", "c"])[numbers],
    }[kind]
    classes = ["b", "c"] if kind == "text" else [1, 2]
    augment = tfdist.Augment(L.GaussianNoise(0.1), classes)
    source, stream = shares(augment, IMAGES, y, sampler=settings().sampler)
    received = examples(stream, 2)
    changed = (received != IMAGES).any((1, 2, 3))
    np.testing.assert_array_equal(changed, numbers > 0)
    assert source.spec()[0].shape.as_list() == [None, 16, 16, 3]


def test_a_batch_without_a_chosen_example_stays() -> None:
    y = np.array([0] * 9 + [1])
    augment = tfdist.Augment([L.Equalization((0, 1))], [1])
    _, stream = shares(augment, IMAGES, y, sampler=settings().sampler, batch_size=3)
    received = examples(stream, 4)
    np.testing.assert_array_equal(received[:9], IMAGES[:9])
    assert (received[9] != IMAGES[9]).any()


def test_repeated_examples_are_seen_unchanged_once_an_epoch() -> None:
    y = np.array([0] * 190 + [1] * 10)
    x = np.ones((200, 1), "float32")
    augment = tfdist.Augment(L.GaussianNoise(0.1), repeated=True)
    _, stream = shares(augment, x, y, sampler=ClassBalanced(), batch_size=200)
    unchanged = []
    for share in stream.take(30):
        values, labels = share.data[0].numpy()[:, 0], share.data[1].numpy()
        assert (values[labels == 0] == 1).all()  # rows of class 0 come at most once
        unchanged.append((values[labels == 1] == 1).sum())
    # Each of 10 rows comes 10 times and is left with 1/10: 10 an epoch, deviation 3.
    assert abs(np.mean(unchanged) - 10) < 4 * 3 / 30**0.5


@pytest.mark.quick
def test_samplers_say_how_often_rows_come() -> None:
    y = np.array([0] * 6 + [1] * 2)
    assert Uniform().repeats(8).tolist() == [1] * 8
    balanced = ClassBalanced().bind(y, 8).repeats(8)
    np.testing.assert_allclose(balanced, [4 / 6] * 6 + [2] * 2)
    assert Undersample().bind(y, 8).repeats(8).max() == 1
    np.testing.assert_allclose(Weighted(y + 1.0).repeats(8), (y + 1) * 8 / 10)
    assert tfdist.privacy.Poisson().repeats(8) is None


def test_a_dict_of_inputs() -> None:
    x = {"picture": IMAGES, "age": np.arange(10, dtype="float32")[:, None]}
    augment = tfdist.Augment({"picture": L.RandomCrop(12, 12)})
    source, stream = shares(augment, x, np.arange(10), sampler=settings().sampler)
    first = next(iter(stream)).data[0]
    assert first["picture"].shape == (7, 12, 12, 3)
    assert source.spec()[0]["picture"].shape.as_list() == [None, 12, 12, 3]
    np.testing.assert_array_equal(first["age"][:, 0], np.arange(7))


def test_whole_numbers_become_what_layers_give() -> None:
    x = (IMAGES * 255).astype("uint8")
    augment = tfdist.Augment(L.RandomFlip(), [1])
    source, stream = shares(augment, x, np.arange(10) % 2)
    assert source.spec()[0].dtype == next(iter(stream)).data[0].dtype == tf.float32


def test_fit_augments_nothing_but_training_data() -> None:
    model = keras.Sequential([keras.Input((4,)), L.Dense(1, kernel_initializer="ones")])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    x, y = np.ones((12, 4), "float32"), np.full((12, 1), 4.0)
    augment = tfdist.Augment(L.GaussianNoise(1.0))
    options = {"validation_data": (x, y), "augment": augment, "verbose": 0, "seed": 1}
    history = tfdist.fit(model, x, y, **options).history
    assert history["loss"][0] > 0.1
    assert history["val_loss"] == [0.0]
    assert tfdist.evaluate(model, x, y, verbose=0) == 0.0


def test_layers_are_left_as_they_were() -> None:
    layer = L.RandomFlip(seed=3)
    before = layer.generator.state.numpy().tolist()
    _, stream = shares(tfdist.Augment(layer), IMAGES, np.arange(10))
    examples(stream, 3)
    assert layer.generator.state.numpy().tolist() == before
    again = L.RandomFlip(seed=3)
    np.testing.assert_array_equal(layer(IMAGES, training=True), again(IMAGES, training=True))


def test_workers_must_augment_alike() -> None:
    def fingerprint(layer: Any) -> str:
        text: str = shares(tfdist.Augment(layer), IMAGES, np.arange(10))[0].fingerprint()
        return text

    assert fingerprint(L.RandomRotation(0.1)) == fingerprint(L.RandomRotation(0.1, seed=4))
    assert fingerprint(L.RandomRotation(0.1)) != fingerprint(L.RandomRotation(0.2))


class Unseeded(keras.Layer):  # type: ignore[misc]
    def call(self, x: Any) -> Any:
        return x + tf.random.normal(tf.shape(x))


class RunningMean(keras.Layer):  # type: ignore[misc]
    def build(self, shape: Any) -> None:
        self.mean = self.add_weight(shape=(), trainable=False, name="seed_generator_state")

    def call(self, x: Any) -> Any:
        self.mean.assign(0.9999 * self.mean + 0.0001 * keras.ops.mean(x))
        return x - self.mean


Y = np.arange(10) % 2
WRONG = {
    "state": (lambda: tfdist.Augment(RunningMean()), Y, {}, "no state.*AssignVariableOp"),
    "mix": (lambda: tfdist.Augment(L.MixUp()), Y, {}, "mixes the examples"),
    "unseeded": (lambda: tfdist.Augment(Unseeded()), Y, {}, "RandomStandardNormal"),
    "none": (lambda: tfdist.Augment([]), Y, {}, "must have a layer"),
    "function": (lambda: tfdist.Augment(tf.abs), Y, {}, "must be Keras layers"),
    "text": (lambda: tfdist.Augment(L.RandomFlip(), "ab"), Y, {}, "a list of classes"),
    "no class": (lambda: tfdist.Augment(L.RandomFlip(), []), Y, {}, "a list of classes"),
    "absent": (lambda: tfdist.Augment(L.RandomFlip(), [1, 2]), Y, {}, "2\\] never do"),
    "kind": (lambda: tfdist.Augment(L.RandomFlip(), ["a"]), Y, {}, "of the kind of `y`"),
    "column": (lambda: tfdist.Augment(L.RandomFlip(), [2]), np.eye(2)[Y], {}, "columns of `y`"),
    "no y": (lambda: tfdist.Augment(L.RandomFlip(), [1]), None, {}, "one target"),
    "nested y": (lambda: tfdist.Augment(L.RandomFlip(), [1]), {"a": Y}, {}, "one target"),
    "shape": (lambda: tfdist.Augment(L.RandomCrop(8, 8), [1]), Y, {}, "keep the shape"),
    "named": (lambda: tfdist.Augment({"a": L.RandomFlip()}), Y, {}, "dict by the name"),
    "once": (lambda: tfdist.Augment(L.RandomFlip(), repeated=True), Y, {}, "type Uniform"),
}


@pytest.mark.parametrize("name", WRONG)
def test_refused(name: str) -> None:
    make, y, changes, message = WRONG[name]
    with pytest.raises(ArgumentError, match=message):
        shares(make(), IMAGES, y, **changes)


def test_repeated_needs_arrays() -> None:
    dataset = tf.data.Dataset.from_tensor_slices((IMAGES, Y)).batch(5)
    augment = tfdist.Augment(L.RandomFlip(), repeated=True)
    with pytest.raises(ArgumentError, match="needs arrays"):
        data.read(dataset, None, None, settings(augment=augment))
