"""What a step is made of, and what of it is no mean: found before it trains."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfdist import _keras
from tfdist._keras import discovery
from tfdist._keras.means import is_mean, parts_of

pytestmark = pytest.mark.quick
SPEC = (tf.TensorSpec((None, 4)), tf.TensorSpec((None, 1)))
X = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
Y = X[:, :1] * 2


class Own(keras.Model):
    """Its step is given to it, and builds what it needs when it first runs."""

    def __init__(self, step: Callable[[Any, Any, Any], Any]) -> None:
        super().__init__()
        self.dense, self.step = keras.layers.Dense(1), step
        self.kept = {"optimizer": keras.optimizers.Adam()}
        self.tracker = keras.metrics.Mean()
        self.counter = keras.Variable(0.0, trainable=False)
        self.plain = tf.Variable(0.0, name="plain")
        self.compile()

    def call(self, x: Any) -> Any:
        return self.dense(x)

    def train_step(self, data: Any) -> Any:
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.step(self, x, y)
        weights = self.dense.trainable_weights
        self.kept["optimizer"].apply(tape.gradient(loss, weights), weights)
        self.tracker.update_state(loss)
        return {"loss": self.tracker.result()}


def mean(model: Any, x: Any, y: Any) -> Any:
    return tf.reduce_mean((model(x) - y) ** 2)


def test_a_trace_finds_what_nobody_lists_and_changes_nothing() -> None:
    def step(model: Any, x: Any, y: Any) -> Any:
        model.counter.assign_add(1.0)
        model.plain.assign_add(1.0)
        return mean(model, x, y) + 0.0 * tf.random.normal([])

    model = Own(step)
    found = discovery.trace(model.train_step, SPEC)
    assert found.optimizers == [model.kept["optimizer"]]
    assert found.assigned == [model.counter]
    assert found.raw == ["plain:0"]
    assert {id(v) for v in found.metrics} == {id(v) for v in model.tracker.variables}
    assert found.is_random
    assert not found.updates_in_branch
    assert model.kept["optimizer"].built
    assert float(model.counter) == float(model.plain) == float(model.tracker.result()) == 0.0
    # Plain ones, which any strategy can move.
    assert type(model.dense.kernel._value).__name__ == "ResourceVariable"


@pytest.mark.parametrize(
    "error", [MemoryError(), tf.errors.ResourceExhaustedError(None, None, "OOM")]
)
def test_a_build_that_needs_too_much_memory_says_so(error: Exception) -> None:
    class Large(keras.optimizers.Adam):
        def build(self, variables: Any) -> None:
            raise error

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(Large(), "mse")
    with pytest.raises(type(error)):
        _keras.build_from_shapes(model, SPEC)


def test_an_update_in_a_branch_is_seen() -> None:
    class Branching(Own):
        def train_step(self, data: Any) -> Any:
            done: Any = super().train_step
            condition = tf.reduce_sum(data[0]) > 0
            return tf.cond(condition, lambda: done(data), lambda: {"loss": 0.0})

    model = Branching(mean)
    model(X)
    model.kept["optimizer"].build(model.dense.trainable_weights)
    assert discovery.trace(model.train_step, SPEC).updates_in_branch


def test_an_eager_step_gets_everything_back() -> None:
    def step(model: Any, x: Any, y: Any) -> Any:
        model.counter.assign_add(1.0)
        random.random(), np.random.rand(), tf.random.normal([])
        return mean(model, x, y)

    model = Own(step)
    keras.utils.set_random_seed(1)
    expected = random.random(), np.random.rand(), float(tf.random.normal([]))
    keras.utils.set_random_seed(1)
    found = discovery.run(model.train_step, (tf.constant(X), tf.constant(Y)))
    assert (random.random(), np.random.rand(), float(tf.random.normal([]))) == expected
    assert found.assigned == [model.counter]
    assert float(model.counter) == float(model.tracker.result()) == 0.0
    assert int(model.kept["optimizer"].iterations) == 0


def summed(model: Any, x: Any, y: Any) -> Any:
    return tf.reduce_sum((model(x) - y) ** 2)


def remembering(model: Any, x: Any, y: Any) -> Any:
    model.counter.assign(0.9 * model.counter + 0.1 * tf.reduce_sum(x))
    return mean(model, x, y)


def centred(model: Any, x: Any, y: Any) -> Any:
    model.counter.assign(0.9 * model.counter + 0.1 * tf.reduce_mean(x))
    return mean(model, x, y)


def hardest(model: Any, x: Any, y: Any) -> Any:
    return tf.reduce_mean(tf.math.top_k(tf.reduce_sum((model(x) - y) ** 2, 1), 2).values)


def easier(values: Any) -> Any:
    return tf.where(values > keras.ops.quantile(values, 0.8), 0.0, values)


def lower(values: Any) -> Any:
    return tf.where(values <= tf.sort(values)[tf.shape(values)[0] // 2], values, 0.0)


def eight(values: Any) -> Any:
    return tf.where(tf.argsort(tf.argsort(values)) < 8, values, 0.0)


def ranked(kept: Any) -> Any:
    """Keeps some rows of a batch by the rank of their losses; each row has its number."""
    return lambda y, p: kept(tf.reduce_mean((y - p) ** 2, -1))


def of_ranked(kept: Any) -> Any:
    return lambda model, x, y: tf.reduce_mean(ranked(kept)(y, model(x)))


def noisy(model: Any, x: Any, y: Any) -> Any:
    noise = keras.random.normal(tf.shape(x), seed=model.seeds)
    return mean(model, x + noise, y)


def of_tensorflow(model: Any, x: Any, y: Any) -> Any:
    return summed(model, x + tf.random.normal(tf.shape(x)), y)


@pytest.mark.parametrize(
    ("step", "named"),
    [
        (mean, None),
        (centred, None),  # a mean of means, weighed by rows
        (noisy, None),  # its noise is a function of the row
        (of_tensorflow, None),  # it cannot be told
        (summed, "gradient"),
        (hardest, "gradient"),
        (remembering, "variable"),
        (of_ranked(easier), "gradient"),
        (of_ranked(lower), "gradient"),
        (of_ranked(eight), "gradient"),
    ],
)
def test_what_is_no_mean_is_named(step: Any, named: str | None) -> None:
    keras.utils.set_random_seed(1)
    model = Own(step)
    model.seeds = keras.random.SeedGenerator(3)
    model(X)
    before = [np.asarray(v) for v in model.variables]
    found = _keras.what_is_no_mean(model.train_step, (tf.constant(X), tf.constant(Y)), 64)
    assert (found is None) if named is None else (named in (found or ""))
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(np.asarray(variable), value)


def test_a_mean_is_tried_on_no_more_batches_than_it_needs() -> None:
    """Every training begins with it: once the whole, and once each of its parts."""
    tried: list[int] = []

    def step(model: Any, x: Any, y: Any) -> Any:
        tried.append(len(x))
        return mean(model, x, y)

    model = Own(step)
    model(X)
    sample = tf.constant(X), tf.constant(Y)
    assert _keras.what_is_no_mean(model.train_step, sample, 64) is None
    assert tried == [len(X), *(end - begin for begin, end in parts_of(len(X)))]


def counting(model: Any, x: Any) -> Any:
    model.counter.assign_add(1.0)
    return model(x)


def averaging(model: Any, x: Any) -> Any:
    model.counter.assign(0.5 * model.counter + tf.reduce_mean(x))
    return model(x)


@pytest.mark.parametrize(
    ("step", "named"),
    [
        (lambda model, x: {"a": model(x), "b": [x, x[:, :2]]}, None),
        (counting, None),  # on every replica alike
        (averaging, "variable"),
        (lambda model, x: model(x - tf.reduce_mean(x, 0)), "result"),
        (lambda model, x: (model(x), tf.reshape(x, (-1, 1))), "result 1"),
        (lambda model, x: tf.reduce_sum(x, 0), "result"),
        (lambda model, x: tf.reduce_sum(x), "result"),
        (lambda model, x: tf.argsort(x[:, 0]), "result"),
    ],
)
def test_what_a_prediction_is_no_rows_of_is_named(step: Any, named: str | None) -> None:
    model = Own(mean)
    model(X)
    sample = tf.constant(X)
    found = _keras.what_is_no_mean(lambda x: step(model, x), sample, 64, predicts=True)
    assert (found is None) if named is None else (named in (found or ""))


@pytest.mark.parametrize("rows", [2, 3, 4, 5, 8, 63, 256])
def test_parts_of_a_batch_are_unlike(rows: int) -> None:
    parts = parts_of(rows)
    assert [begin for begin, _ in parts] == [0, *(end for _, end in parts[:-1])]
    assert parts[-1][1] == rows
    assert len(parts) == (2 if rows < 5 else 3)
    assert 1 <= parts[-1][1] - parts[-1][0] <= 2


@pytest.mark.parametrize(
    ("function", "is_one"),
    [
        (lambda y, p: tf.reduce_mean((y - p) ** 2), True),
        (lambda y, p: tf.reduce_sum((y - p) ** 2), False),
        (lambda y, p: tf.reduce_max(p), False),
        (lambda y, p: 1 - tf.reduce_sum(y * p) / tf.reduce_sum(y + p), False),
        (ranked(tf.identity), True),
        (ranked(easier), False),
        (ranked(lower), False),
        (ranked(eight), False),
    ],
)
def test_a_function_of_a_batch_is_tried(function: Any, is_one: bool) -> None:
    found = []

    @tf.function(input_signature=[tf.TensorSpec((None, 3))])
    def traced(rows: Any) -> None:
        found.append(is_mean(function, rows, rows))

    traced.get_concrete_function()
    assert found[-1] is is_one


def shared(layers: list[Any], loss: Any = "mse", metrics: Any = ()) -> Any:
    model = keras.Sequential([keras.Input((4,)), *layers, keras.layers.Dense(1, "sigmoid")])
    model.compile("sgd", loss, metrics=list(metrics))
    model(X)
    return model


def tracking() -> Any:
    model = Own(mean)
    model(X)
    return model


@pytest.mark.parametrize(
    "made",
    [
        tracking,  # a tracker counts a loss by rows
        lambda: shared([keras.layers.BatchNormalization(), keras.layers.Dropout(0.5, seed=1)]),
        lambda: shared([keras.layers.BatchNormalization(synchronized=True)]),
        lambda: shared([], keras.losses.Dice(), [lambda y, p: tf.reduce_max(y - p)]),
        lambda: shared([], lambda y, p: tf.reduce_sum((y - p) ** 2)),
        lambda: shared([], ranked(lower), [ranked(eight)]),
        lambda: shared([keras.layers.GaussianNoise(0.5, seed=1)], "huber", ["mae", "auc"]),
    ],
)
def test_what_replicas_can_share_is_shared(made: Callable[[], Any]) -> None:
    """Each replica computing all of it would be right as well, and no faster."""
    keras.utils.set_random_seed(1)
    sample = tf.constant(X), tf.constant((Y > 0).astype("float32"))
    assert _keras.what_is_no_mean(made().train_step, sample, 64) is None
