"""Recomputed layers train as plain Keras does without recomputation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfdist
from tfdist import _keras
from tfdist.errors import ArgumentError

L = keras.layers
RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(20, 8)).astype("float32")
WORDS = RNG.integers(1, 20, (20, 6)) * (np.arange(6) < RNG.integers(2, 7, (20, 1)))
TARGETS = RNG.normal(size=(20, 1)).astype("float32")
pytestmark = pytest.mark.quick


@keras.saving.register_keras_serializable("tests")
class Block(L.Layer):  # type: ignore[misc]
    """A block with all that a second call could get wrong."""

    def __init__(self, size: int = 8, **options: Any) -> None:
        super().__init__(**options)
        self.attention = L.MultiHeadAttention(2, 4, dropout=0.2, seed=1)
        self.first = L.Dense(16, "tanh", kernel_regularizer="l2", activity_regularizer="l2")
        self.norm = L.BatchNormalization(momentum=0.9)
        self.dropout = L.Dropout(0.3, seed=2)
        self.second = L.Dense(size)
        self.seeds = keras.random.SeedGenerator(3)
        self.supports_masking = True

    def build(self, shape: Any) -> None:
        self.attention.build(shape, shape)
        self.first.build(shape)
        inner = (*shape[:-1], 16)
        self.norm.build(inner)
        self.second.build(inner)
        self.scale = self.add_weight(shape=(), initializer="ones")
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, x: Any, mask: Any = None, training: bool = False) -> Any:
        self.calls.assign_add(1.0)
        x = x + self.attention(x, x)
        h = self.dropout(self.norm(self.first(x), mask=mask))
        noise = keras.random.normal(keras.ops.shape(h), seed=self.seeds)
        h = h + 0.1 * noise if training else h
        self.add_loss(0.01 * keras.ops.mean(h**2) * self.scale)
        return x + self.scale * self.second(h) + 0.01 * keras.ops.cast(self.calls, x.dtype)


def subclassed() -> Any:
    class Model(keras.Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(name="words_class")
            self.embed = L.Embedding(20, 8, mask_zero=True)
            self.blocks = [Block(name=f"block_{i}") for i in range(2)]
            self.head = L.Dense(1)

        def call(self, x: Any, training: bool = False) -> Any:
            x = self.embed(x)
            for block in self.blocks:
                x = block(x, training=training)
            return self.head(keras.ops.mean(x, 1))

    return Model()


def functional() -> Any:
    words = keras.Input((6,), dtype="int32")
    x = L.Embedding(20, 8, mask_zero=True)(words)
    shared = Block(name="shared")
    x = shared(shared(x))
    inner = keras.Input((None, 8))
    half = L.Dense(8, "tanh", name="tied")(inner)
    two = keras.Model(
        inner, {"a": half, "b": [L.LSTM(8, dropout=0.2, seed=4)(half)]}, name="two"
    )
    both = two(x)
    x = L.Concatenate()([keras.ops.mean(both["a"], 1), both["b"][0]])
    return keras.Model(words, L.Dense(1)(x), name="words_graph")


def trained(make: Callable[[], Any], layers: Any = None, **options: Any) -> list[Any]:
    """Trains with plain Keras, perhaps recomputing layers. Returns all values."""
    keras.utils.set_random_seed(5)
    model = make()
    # Unlike Adam, SGD shows gradients of a wrong scale.
    optimizer = keras.optimizers.SGD(0.05, momentum=0.9, global_clipnorm=0.5)
    model.compile(optimizer, "mse", **options)
    if layers is not None:
        assert tfdist.recompute(model, layers).paths
    x = WORDS if model.name.startswith("words") else VECTORS
    model.fit(x, TARGETS, batch_size=8, shuffle=False, verbose=0)
    return [variable.numpy() for variable in model.variables]


def difference(ours: list[Any], theirs: list[Any]) -> float:
    pairs = zip(ours, theirs, strict=True)
    return max(float(np.max(np.abs(a - b))) for a, b in pairs)


@pytest.mark.parametrize(
    ("make", "layers"), [(subclassed, "blocks"), (functional, ["shared", "two"])]
)
def test_a_model_trains_like_the_same_model_without(make: Any, layers: Any) -> None:
    assert difference(trained(make, layers), trained(make)) < 2e-6


class Small(L.Layer):  # type: ignore[misc]
    """A block, which counts how often Python calls it."""

    calls = 0

    def __init__(self, seed: int = 1, **options: Any) -> None:
        super().__init__(**options)
        self.parts = [L.Dense(9, "tanh"), L.BatchNormalization(), L.Dropout(0.3, seed=seed)]
        self.scale = self.add_weight(shape=(), initializer="ones")

    def call(self, x: Any) -> Any:
        Small.calls += 1
        for part in self.parts:
            x = part(x)
        return x * self.scale


def small() -> Any:
    x = keras.Input((8,))
    return keras.Model(x, L.Dense(1)(Small(seed=2)(Small()(x))))


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_the_precision_is_that_of_the_first_pass(policy: str) -> None:
    keras.config.set_dtype_policy(policy)
    try:
        plain, Small.calls = trained(small), 0
        recomputed = trained(small, "blocks", steps_per_execution=2)
    finally:
        keras.config.set_dtype_policy("float32")
    assert Small.calls >= 2 * 2 + 2  # a pass for shapes, and two that are traced
    assert difference(recomputed, plain) < 1e-6


def test_eager_code_keeps_activations() -> None:
    Small.calls = 0
    plain, calls, Small.calls = trained(small, run_eagerly=True), Small.calls, 0
    assert difference(trained(small, "blocks", run_eagerly=True), plain) == 0
    assert Small.calls == calls


class OwnStep(keras.Model):  # type: ignore[misc]
    """Uses gradients of gradients, tensors and weights from elsewhere, and old gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = L.Dense(8, "tanh"), L.Dense(1)
        self.blocks = [self.Uses(self), self.Uses(self)]
        self.kernel = self.add_weight(shape=(8, 8))
        self.raw = tf.Variable(2.0)
        self.build((None, 8))
        for part in (self.first, self.head, *(block.dense for block in self.blocks)):
            part.build((None, 8))

    def build(self, shape: Any) -> None:
        pass

    class Uses(L.Layer):  # type: ignore[misc]
        """A block that does not get all that it needs as arguments."""

        def __init__(self, model: Any) -> None:
            super().__init__()
            self.dense = L.SpectralNormalization(L.Dense(8, "tanh"))
            self._model = [lambda: model]  # hidden from Keras, as its weights are the model's

        def call(self, x: Any, training: bool = False) -> Any:
            model = self._model[0]()
            self.inner = self.dense(x, training=training)
            return model.raw * tf.matmul(self.inner * model.context, model.kernel)

    def call(self, x: Any, training: bool = False) -> Any:
        self.context = self.first(x)
        for block in self.blocks:
            x = block(x, training=training)
        self.add_loss(keras.ops.mean(self.blocks[0].inner ** 2))
        return self.head(x)

    def train_step(self, data: Any) -> Any:
        x, y = data
        weights = self.trainable_variables
        with tf.GradientTape() as one, tf.GradientTape() as other:
            with tf.GradientTape() as inner:
                inner.watch(x)
                outputs = self(x, training=True)
            slope = inner.gradient(outputs, x)
            loss = keras.ops.mean((outputs - y) ** 2) + keras.ops.mean(slope**2)
            second = keras.ops.mean(outputs**2) + sum(self.losses)
        self.optimizer.apply(one.gradient(loss, weights), weights)
        # The weights have changed: those of the forward pass count.
        *gradients, raw = other.gradient(second, [*weights, self.raw])
        self.optimizer.apply(gradients, weights)
        self.raw.assign_sub(0.1 * raw)
        return {"loss": loss, "raw": self.raw + 0.0}


def test_nothing_that_a_layer_uses_is_missed() -> None:
    assert difference(trained(OwnStep, "blocks"), trained(OwnStep)) < 2e-6


def test_the_second_pass_waits_for_the_gradients_of_its_results() -> None:
    model = keras.Sequential(
        [keras.Input((8,)), *(keras.Sequential([L.Dense(8, "tanh")]) for _ in range(2))]
    )
    model.compile("sgd", "mse")
    tfdist.recompute(model)
    graph = _keras.step_graph(model, *_keras.batch_specs(model, 4, None, None))
    first, second = (
        [op for op in part if op.type == "Tanh"]
        for part in (graph.ops[: graph.forward], graph.ops[graph.forward :])
    )
    assert len(first) == len(second) == 2
    for op in second:
        before: set[Any] = set()
        waiting = [op]
        while waiting:
            waiting += [o for o in _before(waiting.pop()) if o not in before]
            before.update(waiting)
        assert first[-1] in before


def _before(op: Any) -> list[Any]:
    return [*(tensor.op for tensor in op.inputs), *op.control_inputs]


def test_xla_does_not_merge_the_passes() -> None:
    model = keras.Sequential([keras.Sequential([L.Dense(8, "tanh")] * 2) for _ in range(2)])
    x = tf.ones((4, 8))

    @tf.function(jit_compile=True)
    def compiled(x: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(x, training=True) ** 2)
        return tape.gradient(loss, model.trainable_variables)

    model.build((4, 8))
    kept = compiled(x), compiled.experimental_get_compiler_ir(x)(stage="optimized_hlo")
    compiled = tf.function(compiled.python_function, jit_compile=True)
    tfdist.recompute(model)
    again = compiled(x), compiled.experimental_get_compiler_ir(x)(stage="optimized_hlo")
    for a, b in zip(kept[0], again[0], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    assert again[1].count("tanh(") > kept[1].count("tanh(")


class Refused(L.Layer):  # type: ignore[misc]
    """A block that would do something else when called again."""

    def __init__(self, kind: str) -> None:
        super().__init__(name="refused")
        self.kind, self.count = kind, tf.Variable(0.0, trainable=False)
        cell = L.StackedRNNCells([L.SimpleRNNCell(4), Dropping(4)])
        self.rnn = L.RNN(cell) if kind == "loop" else None

    def call(self, x: Any) -> Any:
        if self.kind == "random":
            return x * tf.random.normal(tf.shape(x))
        if self.kind == "function":
            return tf.cond(x[0, 0] > 0, lambda: x, lambda: x * tf.random.uniform([]))
        if self.kind == "variable":
            self.count.assign_add(1.0)
            return x * self.count
        if self.kind == "python":
            return tf.ensure_shape(tf.numpy_function(np.tanh, [x], tf.float32), x.shape) + x
        return self.rnn(x[:, :, None])


class Dropping(L.SimpleRNNCell):  # type: ignore[misc]
    """A cell that draws in each turn of the loop."""

    def __init__(self, units: int) -> None:
        super().__init__(units)
        self.drop = L.Dropout(0.5)

    def call(self, x: Any, states: Any, training: bool = False) -> Any:
        return super().call(self.drop(x, training=training), states)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("random", "TensorFlow's RandomStandardNormal"),
        ("function", "TensorFlow's RandomUniform"),
        ("variable", "a tf.Variable or table by AssignAddVariableOp"),
        ("python", "calls Python by PyFunc"),
        ("loop", "changes .*seed_generator_state' there"),
    ],
)
def test_what_cannot_be_repeated_is_refused(kind: str, words: str) -> None:
    def make() -> Any:
        x = keras.Input((8,))
        return keras.Model(x, L.Dense(1)(Refused(kind)(x)))

    with pytest.raises(ArgumentError, match=rf"recomputed must .*layer 'refused', .*{words}"):
        trained(make, ["refused"])
