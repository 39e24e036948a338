"""Sums of clipped gradients equal those of a plain loop over examples, for each layer."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfdist._keras import layers as keras_layers
from tfdist.errors import ArgumentError
from tfdist.privacy.mechanism import clipping, independence
from tfdist.privacy.mechanism.clipping_groups import (
    Alone,
    ClippingGroups,
    CopiesOfExamples,
    Groups,
)

L = keras.layers
EXAMPLES = 5
Units = list[list[int]]


def clipped_sum(*args: Any) -> tuple[list[Any], Any]:
    """Gives the sums and the norms."""
    sums, norms, *_ = clipping.clipped_sum(*args)
    return sums, norms


def gradients_of_each(model: Any, x: Any, y: Any) -> list[list[Any]]:
    """Takes the gradients of one example after the other."""
    variables, found = model.trainable_variables, []
    for i in range(len(tf.nest.flatten(y)[0])):
        one_x, one_y = (
            tf.nest.map_structure(lambda a, i=i: a[i : i + 1], part) for part in (x, y)
        )
        with tf.GradientTape() as tape:
            loss = model.compute_loss(one_x, one_y, model(one_x, training=True))
        found.append(
            [
                np.zeros(v.shape) if g is None else tf.convert_to_tensor(g).numpy()
                for g, v in zip(tape.gradient(loss, variables), variables, strict=True)
            ]
        )
    return found


def clipped(
    gradients: list[list[Any]],
    units: Units,
    clip: float,
    scale: float = 1.0,
    measured: Any = None,
) -> tuple[list[Any], Any]:
    """Adds up the gradients of each unit, and clips what it adds.

    By its norm, or by the one that was measured.
    """
    sums, norms = [np.zeros(g.shape) for g in gradients[0]], []
    for number, unit in enumerate(units):
        total = [
            scale * sum(parts) for parts in zip(*(gradients[i] for i in unit), strict=True)
        ]
        norm = np.sqrt(sum((t.astype("float64") ** 2).sum() for t in total))
        norms.append(norm)
        used = norm if measured is None else float(measured[number])
        factor = min(1.0, clip / used) if used else 1.0
        sums = [s + t * factor for s, t in zip(sums, total, strict=True)]
    return sums, np.array(norms)


def loop(
    model: Any, x: Any, y: Any, clip: float, measured: Any = None
) -> tuple[list[Any], Any]:
    """Takes the gradient of one example after the other, and clips it."""
    gradients = gradients_of_each(model, x, y)
    units = [[i] for i in range(len(gradients))]
    return clipped(gradients, units, clip, measured=measured)


def data(*shape: int, words: int = 0) -> Any:
    random = np.random.default_rng(0)
    if words:
        return random.integers(0, words, size=(EXAMPLES, *shape))
    return random.normal(size=(EXAMPLES, *shape)).astype("float32")


def sequential(
    shape: Any, *layers: Any, words: int = 0, classes: int = 3
) -> tuple[Any, Any, Any]:
    keras.utils.set_random_seed(1)
    last = [L.GlobalAveragePooling1D()] if layers[-1:] == ("pool",) else [L.Flatten()]
    kept = [layer for layer in layers if layer != "pool"]
    model = keras.Sequential([keras.Input(shape), *kept, *last, L.Dense(classes)])
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    y = np.random.default_rng(1).integers(0, classes, size=EXAMPLES)
    return model, data(*shape, words=words), y


def functional(make: Any) -> Any:
    def build() -> tuple[Any, Any, Any]:
        keras.utils.set_random_seed(1)
        return make()

    return build


def shared_dense() -> tuple[Any, Any, Any]:
    x = keras.Input((4,))
    layer = L.Dense(4, activation="tanh")
    model = keras.Model(x, L.Dense(1)(layer(layer(x))))
    model.compile(loss="mse")
    return model, data(4), data(1)


def shared_embedding() -> tuple[Any, Any, Any]:
    a, b = keras.Input((3,)), keras.Input((5,))
    table = L.Embedding(7, 4)
    both = L.Concatenate(axis=1)([table(a), table(b)])
    model = keras.Model([a, b], L.Dense(1)(L.Flatten()(both)))
    model.compile(loss="mse")
    return model, [data(3, words=7), data(5, words=7)], data(1)


def attention() -> tuple[Any, Any, Any]:
    x = keras.Input((6, 8))
    made = L.LayerNormalization()(x + L.MultiHeadAttention(2, 4)(x, x))
    made = made + L.Dense(8)(L.Dense(16, activation="gelu")(made))
    model = keras.Model(x, L.Dense(2)(L.GlobalAveragePooling1D()(made)))
    model.compile(loss="mse")
    return model, data(6, 8), data(2)


def several_outputs() -> tuple[Any, Any, Any]:
    a, b = keras.Input((4,)), keras.Input((3,))
    made = L.Dense(5, activation="relu")(L.Concatenate()([a, b]))
    model = keras.Model({"a": a, "b": b}, [L.Dense(1)(made), L.Dense(2)(made)])
    model.compile(loss=["mse", "mae"], loss_weights=[0.3, 2.0])
    return model, {"a": data(4), "b": data(3)}, [data(1), data(2) + 1]


def masked_words() -> tuple[Any, Any, Any]:
    x = keras.Input((6,))
    made = L.LSTM(4)(L.Embedding(9, 5, mask_zero=True)(x))
    model = keras.Model(x, L.Dense(1)(made))
    model.compile(loss="mse")
    words = data(6, words=8) + 1
    words[np.arange(6) >= np.array([[6], [3], [1], [4], [2]])] = 0
    return model, words, data(1)


def encoder_and_decoder() -> tuple[Any, Any, Any]:
    x = keras.Input((4, 3))
    encoded, *states = L.LSTM(4, return_state=True)(x)
    decoded = L.GRU(4, return_sequences=True)(x, initial_state=states[1])
    made = L.LSTM(4, recurrent_activation="tanh")(decoded, initial_state=states)
    model = keras.Model(x, L.Dense(1)(L.Concatenate()([encoded, made])))
    model.compile(loss="mse")
    return model, data(4, 3), data(1)


def masked_loss() -> tuple[Any, Any, Any]:
    x = keras.Input((6,))
    model = keras.Model(x, L.Dense(2)(L.Embedding(9, 5, mask_zero=True)(x)))
    model.compile(loss="mse")
    words = data(6, words=8) + 1
    words[np.arange(6) >= np.array([[6], [3], [1], [4], [2]])] = 0
    return model, words, data(6, 2)


def loss_is_sum() -> tuple[Any, Any, Any]:
    model, x, _ = sequential((4,), L.Dense(3, activation="relu"))
    model.compile(loss=keras.losses.MeanSquaredError(reduction="sum"))
    return model, x, data(3)


def frozen() -> tuple[Any, Any, Any]:
    model, x, y = sequential((4,), L.Dense(6), L.Dense(5, activation="relu"))
    model.layers[0].trainable = False
    return model, x, y


def low_rank(shape: Any, layer: Any, words: int = 0, quantized: bool = False) -> Any:
    """Trains a low-rank change of a layer's weights, and the bias."""

    def make() -> tuple[Any, Any, Any]:
        model, x, y = sequential(shape, layer(), words=words)
        changed = model.layers[0]
        changed.enable_lora(2, lora_alpha=3)
        if quantized:
            changed.quantize("int8")
            model.compile(loss=model.loss)
        assert len(changed.trainable_variables) < len(changed.variables)
        random = np.random.default_rng(3)
        for variable in changed.trainable_variables:
            variable.assign(random.normal(size=variable.shape))
        return model, x, y

    return functional(make)


def tied_by_hand() -> tuple[Any, Any, Any]:
    x = keras.Input((4,))
    dense = L.Dense(3, use_bias=False)
    table = L.Dense(4)  # in two places, and in one of them as it should be
    made = Borrowing(dense)(L.Dense(3)(dense(table(x))))
    made = keras.ops.matmul(made, keras.ops.transpose(table.kernel))
    model = keras.Model(x, L.Dense(2)(made))
    model.compile(loss="mse")
    return model, data(4), data(2)


def tied_in_a_model() -> tuple[Any, Any, Any]:
    class Tied(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.dense = L.Embedding(6, 4), L.Dense(4, activation="tanh")

        def call(self, x: Any) -> Any:
            made = self.dense(keras.ops.mean(self.words(x), 1))
            return keras.ops.matmul(made, keras.ops.transpose(self.words.embeddings))

    model = Tied()
    model.compile(loss="mse")
    model(data(3, words=6))
    return model, data(3, words=6), data(6)


def layers_in_the_loss() -> tuple[Any, Any, Any]:
    class Rebuilding(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.code, self.last, self.back = L.Dense(3, "tanh"), L.Dense(2), L.Dense(4)

        def build(self, shape: Any) -> None:
            self.code.build(shape)
            self.last.build((None, 3))
            self.back.build((None, 3))

        def call(self, x: Any) -> Any:
            return self.last(self.code(x))

        def compute_loss(self, x: Any, y: Any, y_pred: Any, *options: Any) -> Any:
            rebuilt = keras.ops.square(self.back(self.code(x)) - x)
            return keras.ops.mean(keras.ops.square(y_pred - y)) + keras.ops.mean(rebuilt)

    model = Rebuilding()
    model.compile()
    model(data(4))
    return model, data(4), data(2)


def positions_in_a_model() -> tuple[Any, Any, Any]:
    class Summing(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places, self.dense = (
                L.Embedding(6, 4),
                L.Embedding(3, 4),
                L.Dense(2),
            )

        def call(self, x: Any) -> Any:
            made = keras.ops.tanh(self.words(x) + self.places(keras.ops.arange(3)))
            return self.dense(keras.ops.mean(made, 1))

    model = Summing()
    model.compile(loss="mse")
    model(data(3, words=6))
    return model, data(3, words=6), data(2)


def folded_and_not() -> tuple[Any, Any, Any]:
    layer = L.Dense(4)
    return sequential((6, 4), layer, L.Activation("tanh"), Folded(layer))


def frozen_kernel() -> tuple[Any, Any, Any]:
    model, x, y = sequential((4,), L.Dense(6), Scale(), L.Dense(5, activation="relu"))
    model.layers[0].kernel.trainable = False
    model.layers[1].offset.trainable = False
    return model, x, y


class Scale(L.Layer):
    def build(self, shape: Any) -> None:
        self.factor = self.add_weight(shape=(shape[-1],), initializer="ones")
        self.offset = self.add_weight(shape=(shape[-1],), initializer="ones")

    def call(self, inputs: Any) -> Any:
        return inputs * self.factor + self.offset


class Positions(L.Layer):
    """Adds a row of a table for each place, the same for all examples."""

    def __init__(self, count: int, size: int) -> None:
        super().__init__()
        self.table = L.Embedding(count, size)

    def call(self, inputs: Any) -> Any:
        return inputs + self.table(keras.ops.arange(keras.ops.shape(inputs)[1]))


class ByOne(L.Layer):
    """Calls a layer for one example after the other, in a loop of TensorFlow."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def call(self, inputs: Any) -> Any:
        return keras.ops.map(lambda row: self.inner(row[None])[0], inputs)


class Folded(L.Layer):
    """Calls a layer with positions folded into the batch."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def call(self, inputs: Any) -> Any:
        shape = keras.ops.shape(inputs)
        made = self.inner(keras.ops.reshape(inputs, (-1, *shape[2:])))
        return keras.ops.reshape(made, (-1, shape[1], *made.shape[1:]))


class Borrowing(L.Layer):
    """Uses another layer's weight outside that layer's call."""

    def __init__(self, other: Any) -> None:
        super().__init__()
        self.other = other

    def call(self, inputs: Any) -> Any:
        return keras.ops.matmul(inputs, keras.ops.transpose(self.other.kernel))


FAST = {
    "dense": lambda: sequential(
        (4,), L.Dense(6, activation="relu"), L.Dense(5, use_bias=False)
    ),
    "dense_many_positions": lambda: sequential((9, 4), L.Dense(3, activation="tanh")),
    "dense_few_positions": lambda: sequential((2, 40), L.Dense(30, activation="tanh")),
    # Long enough to be compiled by XLA within a traced step, as the next one is.
    "dense_long": lambda: sequential((64, 96), L.Dense(128, activation="tanh"), "pool"),
    "embedding_long": lambda: sequential((64,), L.Embedding(40, 160), "pool", words=40),
    "dense_three_axes": lambda: sequential((2, 3, 4), L.Dense(5)),
    "einsum": lambda: sequential(
        (3, 4), L.EinsumDense("abc,cde->abde", (3, 2, 5), bias_axes="de", activation="relu")
    ),
    "einsum_two_contracted": lambda: sequential(
        (3, 4, 2), L.EinsumDense("abcd,cde->abe", (3, 6), bias_axes="e")
    ),
    "einsum_turned": lambda: sequential((3, 4), L.EinsumDense("abc,dc->abd", (3, 5))),
    "einsum_ellipsis": lambda: sequential((3, 4), L.EinsumDense("...x,xy->...y", 5)),
    "einsum_over_time": lambda: sequential(
        (3, 4), L.EinsumDense("abc,bd->adc", (5, 4), bias_axes="d")
    ),
    "conv1d": lambda: sequential((8, 3), L.Conv1D(4, 3, activation="relu")),
    "conv1d_causal": lambda: sequential(
        (8, 3), L.Conv1D(4, 3, padding="causal", dilation_rate=2)
    ),
    "conv2d": lambda: sequential(
        (6, 7, 3), L.Conv2D(4, (3, 2), padding="same", strides=2, activation="relu")
    ),
    "conv2d_wide": lambda: sequential(
        (7, 6, 13), L.Conv2D(4, (3, 4), padding="same", strides=(2, 3))
    ),
    "conv2d_wide_dilated": lambda: sequential(
        (8, 9, 13), L.Conv2D(4, 3, padding="same", dilation_rate=2)
    ),
    "conv3d_wide": lambda: sequential((4, 5, 4, 13), L.Conv3D(2, 2, strides=(1, 2, 1))),
    "conv1d_wide": lambda: sequential((8, 40), L.Conv1D(3, 3, padding="causal")),
    "depthwise2d_wide": lambda: sequential((6, 6, 13), L.DepthwiseConv2D(3, strides=2)),
    "conv2d_dilated": lambda: sequential((7, 7, 2), L.Conv2D(3, 3, dilation_rate=2)),
    "conv2d_groups": lambda: sequential((5, 5, 4), L.Conv2D(6, 3, groups=2)),
    "conv3d": lambda: sequential((4, 4, 5, 2), L.Conv3D(3, 2, use_bias=False)),
    "depthwise1d": lambda: sequential((7, 3), L.DepthwiseConv1D(3, depth_multiplier=2)),
    "depthwise2d": lambda: sequential(
        (6, 6, 3), L.DepthwiseConv2D(3, depth_multiplier=2, padding="same", activation="relu")
    ),
    "embedding": lambda: sequential((6,), L.Embedding(4, 5), words=4),
    "layer_norm": lambda: sequential((4, 6), L.Dense(6), L.LayerNormalization()),
    "layer_norm_axes": lambda: sequential((4, 6), L.LayerNormalization(axis=(1, 2))),
    "layer_norm_no_center": lambda: sequential((4, 6), L.LayerNormalization(center=False)),
    "group_norm": lambda: sequential((5, 5, 6), L.GroupNormalization(3)),
    "group_norm_no_scale": lambda: sequential((5, 6), L.GroupNormalization(2, scale=False)),
    "rms_norm": lambda: sequential((4, 6), L.Dense(6), L.RMSNormalization()),
    "attention": functional(attention),
    "shared_dense": functional(shared_dense),
    "shared_embedding": functional(shared_embedding),
    "several_outputs": functional(several_outputs),
    "masked_loss": functional(masked_loss),
    "loss_is_sum": functional(loss_is_sum),
    "frozen": functional(frozen),
    "lstm": lambda: sequential((5, 3), L.LSTM(4, return_sequences=True)),
    "gru": lambda: sequential((5, 3), L.GRU(4, activation="relu"), L.Dense(3)),
    "simple_rnn": lambda: sequential(
        (5, 3), L.SimpleRNN(4, use_bias=False, return_sequences=True, go_backwards=True)
    ),
    "bidirectional": lambda: sequential((5, 3), L.Bidirectional(L.LSTM(4))),
    "encoder_and_decoder": functional(encoder_and_decoder),
    "masked_words": functional(masked_words),
    "rnn_of_a_cell": lambda: sequential((5, 3), L.RNN(L.LSTMCell(4), return_sequences=True)),
    "folded_dense": lambda: sequential((6, 4), Folded(L.Dense(5, activation="tanh"))),
    "folded_embedding": lambda: sequential((3, 4), Folded(L.Embedding(5, 2)), words=5),
    "folded_conv": lambda: sequential((3, 6, 2), Folded(L.Conv1D(3, 3)), L.Activation("tanh")),
    "folded_and_not": functional(folded_and_not),
    "lora_dense": low_rank((4,), lambda: L.Dense(6, activation="tanh")),
    "lora_einsum": low_rank(
        (3, 4), lambda: L.EinsumDense("abc,cde->abde", (3, 2, 5), bias_axes="de")
    ),
    "lora_einsum_turned": low_rank(
        (3, 4, 2), lambda: L.EinsumDense("abcd,dce->abe", (3, 6), bias_axes="e")
    ),
    "lora_einsum_of_8_bits": low_rank(
        (3, 4), lambda: L.EinsumDense("abc,cde->abde", (3, 2, 5), "tanh"), quantized=True
    ),
    "lora_embedding": low_rank((6,), lambda: L.Embedding(4, 5), words=4),
    "lora_conv": low_rank((6, 6, 3), lambda: L.Conv2D(4, 3, activation="relu")),
}
SLOW = {
    "gru_reset_before": lambda: sequential((5, 3), L.GRU(4, reset_after=False)),
    "time_distributed": lambda: sequential((3, 4), L.TimeDistributed(L.Dense(2))),
    "separable_conv": lambda: sequential((6, 6, 2), L.SeparableConv2D(3, 3)),
    "conv_transpose": lambda: sequential((4, 4, 2), L.Conv2DTranspose(3, 2)),
    "einsum_per_position": lambda: sequential((3, 4), L.EinsumDense("abc,bcd->abd", (3, 5))),
    "prelu": lambda: sequential((4, 5), L.PReLU()),
    "positions": lambda: sequential((5, 4), L.Dense(4), Positions(5, 4), L.Activation("tanh")),
    "positions_in_a_model": functional(positions_in_a_model),
    "folded_custom": lambda: sequential((5, 4), Folded(Scale())),
    "custom": lambda: sequential((4, 5), Scale()),
    "tied_by_hand": functional(tied_by_hand),
    "tied_in_a_model": functional(tied_in_a_model),
    "layers_in_the_loss": functional(layers_in_the_loss),
    "frozen_kernel": functional(frozen_kernel),
    "lora_conv_groups": low_rank((5, 5, 4), lambda: L.Conv2D(6, 3, groups=2)),
    "lora_einsum_over_inputs": low_rank((3, 4), lambda: L.EinsumDense("abc,dc->abd", (3, 5))),
    "layer_norm_turned": lambda: sequential((4, 6), L.LayerNormalization(axis=(2, 1))),
}


def close(received: Any, expected: Any) -> None:
    for a, b in zip(received, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


# What is clipped together: the rows, what says so, whose rows are one unit, the factor.
WAYS: dict[str, tuple[list[int], ClippingGroups, Units, float]] = {
    "examples": ([0, 1, 2, 3, 4], Alone(), [[0], [1], [2], [3], [4]], 1.0),
    "users": (
        [0, 1, 2, 3, 4],
        Groups(tf.constant([7, 7, 7, 2, 9]), 3),
        [[0, 1, 2], [3], [4]],
        1.0,
    ),
    "copies": ([0, 1, 2, 3], CopiesOfExamples(2), [[0, 1], [2, 3]], 0.5),
}  # fmt: skip


def some(structure: Any, rows: list[int]) -> Any:
    return tf.nest.map_structure(lambda leaf: np.asarray(leaf)[rows], structure)


@pytest.mark.parametrize("name", [*FAST, *SLOW])
def test_equals_a_loop_over_examples(name: str) -> None:
    model, x, y = {**FAST, **SLOW}[name]()
    gradients = gradients_of_each(model, x, y)
    for rows, together, units, scale in WAYS.values():
        _, norms = clipped(gradients, units, 1.0, scale)
        clip = float(np.median(norms))  # some are clipped, some are not
        mask = np.ones(len(rows), bool)
        received = clipping.clipped_sum(
            model, some(x, rows), some(y, rows), mask, clip, grouping=together
        )
        # Enlarged by the most that rounding can take from them.
        assert np.all(received.norms >= norms * (1 - 1e-5) - 1e-6)
        np.testing.assert_allclose(received.norms, norms, rtol=3e-3, atol=1e-6)
        close(received.sums, clipped(gradients, units, clip, scale, received.norms)[0])
    is_fast = name in FAST or name.startswith(("einsum", "layer_norm_", "lora"))
    alone = [layer for layer in clipping.computed_alone(model) if layer != "the loss"]
    assert (alone == []) == is_fast


# One for each way of computing norms and sums. Tracing all costs 40 s: in `make test-full`.
TRACED = (
    "dense",
    "dense_long",
    "embedding_long",
    "conv2d",
    "embedding",
    "group_norm",
    "attention",
    "masked_words",
    "gru",
    "custom",
    "time_distributed",
    "layers_in_the_loss",
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in TRACED else pytest.mark.full)
        for name in (*FAST, *SLOW)
    ],
)
def test_traced_it_is_the_same_and_the_check_finds_nothing(name: str) -> None:
    model, x, y = {**FAST, **SLOW}[name]()
    gradients = gradients_of_each(model, x, y)
    units = [[i] for i in range(EXAMPLES)]
    clip = float(np.median(clipped(gradients, units, 1.0)[1]))
    traced = tf.function(
        lambda x, y, mask: clipped_sum(model, x, y, mask, clip), autograph=False
    )
    tensors = [tf.nest.map_structure(tf.constant, part) for part in (x, y)]
    received, norms = traced(*tensors, tf.ones([EXAMPLES], tf.bool))
    expected, expected_norms = clipped(gradients, units, clip, measured=norms)
    assert np.all(norms >= expected_norms * (1 - 1e-5) - 1e-6)
    np.testing.assert_allclose(norms, expected_norms, rtol=3e-3, atol=1e-6)
    close(received, expected)
    independence.check(model, x, y)


@pytest.mark.parametrize("name", ["dense", "conv2d", "attention", "embedding", "lstm"])
def test_eager_equals_traced_and_masked_rows_count_nothing(name: str) -> None:
    model, x, y = {**FAST, **SLOW}[name]()
    mask = np.array([True, False, True, True, False])
    expected, norms = loop(model, x[mask], y[mask], 0.5)
    received, received_norms = clipped_sum(model, x, y, mask, 0.5)
    close(received, expected)
    np.testing.assert_allclose(received_norms[mask], norms, rtol=1e-4)
    assert not np.any(received_norms[~mask])


@pytest.mark.parametrize("name", ["dense", "conv2d", "attention", "embedding"])
def test_compiled_by_xla(name: str) -> None:
    model, x, y = FAST[name]()
    expected, _ = loop(model, x, y, 0.5)
    compiled = tf.function(
        lambda x, y, mask: clipped_sum(model, x, y, mask, 0.5),
        autograph=False,
        jit_compile=True,
    )
    received, _ = compiled(tf.constant(x), tf.constant(y), tf.ones([EXAMPLES], tf.bool))
    close(received, expected)


@pytest.mark.parametrize("name", ["dense", "conv2d", "attention", "lstm"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_that_are_not_finite_count_nothing(name: str, bad: float) -> None:
    model, x, y = {**FAST, **SLOW}[name]()
    finite = np.array([True, True, False, True, True])
    expected, _ = loop(model, x[finite], y[finite], 0.5)
    x[2] = bad
    for mask in (np.ones(EXAMPLES, bool), finite):
        received, norms = clipped_sum(model, x, y, mask, 0.5)
        close(received, expected)
        assert norms[2] == 0


def test_rows_that_are_not_finite_count_nothing_where_norms_are_compiled() -> None:
    model, x, y = FAST["dense_long"]()
    finite = np.array([True, True, False, True, True])
    known = x[finite]
    x[2] = np.nan
    everyone = np.ones(EXAMPLES, bool)
    traced = tf.function(lambda x, y: clipped_sum(model, x, y, everyone, 0.5), autograph=False)
    made = traced.get_concrete_function(tf.constant(x), tf.constant(y))
    calls = [op for op in made.graph.get_operations() if op.type == "PartitionedCall"]
    assert any("_XlaMustCompile" in call.node_def.attr for call in calls)
    received, norms = traced(tf.constant(x), tf.constant(y))
    expected, _ = loop(model, known, y[finite], 0.5, norms[finite])
    close(received, expected)
    assert norms[2] == 0


@pytest.mark.quick
def test_no_row_counts() -> None:
    model, x, y = FAST["dense"]()
    received, norms = clipped_sum(model, x, y, np.zeros(EXAMPLES, bool), 0.5)
    assert not any(np.any(part) for part in received)
    assert not np.any(norms)


def test_mixed_precision() -> None:
    model, x, y = FAST["attention"]()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        mixed, _, _ = FAST["attention"]()
    finally:
        keras.config.set_dtype_policy("float32")
    mixed.set_weights(model.get_weights())
    expected, _ = loop(model, x, y, 0.5)
    received, _ = clipped_sum(mixed, x, y, np.ones(EXAMPLES, bool), 0.5)
    for a, b in zip(received, expected, strict=True):
        assert a.dtype == tf.float32
        assert np.linalg.norm(a - b) < 0.05 * np.linalg.norm(b) + 0.01


def cancelling(kind: str) -> tuple[Any, Any]:
    """Gives a model, and an example whose gradients at two positions nearly cancel."""
    x = data(2, 16)[:1] * 0.01 + 100
    if kind == "positions":
        inputs = keras.Input((2, 16))
        made = L.Dense(8)(inputs)
        a, b = made[:, 0], made[:, 1]
    elif kind == "shared":
        inputs = [keras.Input((16,)), keras.Input((16,))]
        dense = L.Dense(8)
        a, b = (dense(each) for each in inputs)
        x = [x[:, 0], x[:, 1]]
    else:
        inputs = keras.Input((2,))
        made = L.Embedding(10, 8)(inputs) * 1e3
        a, b = made[:, 0] * 1.0001, made[:, 1]
        x = np.array([[3, 3]])
    ones = keras.initializers.Constant(1.0)
    outputs = L.Dense(1, use_bias=False, kernel_initializer=ones, trainable=False)(a - b)
    model = keras.Model(inputs, outputs)
    model.compile(loss="mse")
    return model, x


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["positions", "shared", "words"])
def test_an_example_that_cancels_adds_no_more_than_the_norm(kind: str) -> None:
    for seed in range(3):
        keras.utils.set_random_seed(seed)
        model, x = cancelling(kind)
        sums, _ = clipped_sum(model, x, np.array([[1e4]]), np.ones(1, bool), 1.0)
        assert np.sqrt(sum(np.sum(np.square(s, dtype="float64")) for s in sums)) < 1 + 1e-5


def test_tied_weights_see_the_dropout_that_others_see() -> None:
    class Tied(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.dense, self.drop = L.Dense(4), L.Dropout(0.5)

        def call(self, x: Any, training: bool = False) -> Any:
            made = self.drop(self.dense(x), training=training)
            return keras.ops.matmul(made, keras.ops.transpose(self.dense.kernel))

    model = Tied()
    model.compile(loss="mse")
    model(data(4))
    independence.check(model, data(4), data(4))


def test_sensitivity_is_the_clipping_norm() -> None:
    model, x, y = FAST["attention"]()
    ones = np.ones(EXAMPLES, bool)
    for out in range(EXAMPLES):
        without = ones.copy()
        without[out] = False
        pair = [clipped_sum(model, x, y, m, 0.01)[0] for m in (ones, without)]
        moved = sum(np.sum((a - b).numpy() ** 2) for a, b in zip(*pair, strict=True))
        assert np.sqrt(moved) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.quick
def test_what_mixes_or_draws_is_refused() -> None:
    ones = np.ones(EXAMPLES, bool)
    for layers, message in (
        ((L.Dense(4), L.BatchNormalization()), "must not mix the examples"),
        ((L.BatchNormalization(center=False, scale=False),), "must not mix the examples"),
        ((L.GRU(4, reset_after=False, dropout=0.5),), "must give the same outputs"),
        ((ByOne(L.Dense(4)),), "must be called by Python code of the model"),
        ((L.SpectralNormalization(L.Dense(4)),), "changes its weights when it is called"),
    ):
        shape = (5, 3) if isinstance(layers[0], L.GRU) else (4,)
        model, x, y = sequential(shape, *layers)
        with pytest.raises(ArgumentError, match=message):
            clipped_sum(model, x, y, ones, 1.0)
        # Else the next `MirroredStrategy().scope()` is refused.
        assert tf.compat.v1.get_variable_scope().caching_device is None


@pytest.mark.quick
class TestKerasContract:
    def test_call_is_looked_up_on_the_instance(self) -> None:
        layer = L.Dense(2)
        layer.build((None, 3))
        seen = []

        def through(call: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(args[0].shape)
            return call(*args, **kwargs)

        with keras_layers.called_through(layer, through):
            layer(np.ones((4, 3)))
        layer(np.ones((5, 3)))
        assert seen == [(4, 3)]
        assert "call" not in vars(layer)

    def test_own_variables_and_sublayers(self) -> None:
        inner = L.Dense(2)
        outer = keras.Sequential([keras.Input((3,)), inner])
        assert keras_layers.own_variables(outer) == []
        assert [v.name for v in keras_layers.own_variables(inner)] == ["kernel", "bias"]
        assert inner in keras_layers.sublayers(outer)

    def test_seeds_and_masks(self) -> None:
        assert len(keras_layers.seeds(L.Dropout(0.5))) == 1
        embedded = L.Embedding(3, 2, mask_zero=True)(np.array([[0, 1]]))
        assert keras_layers.has_mask(embedded)
        assert not keras_layers.has_mask(L.Dense(1)(np.ones((1, 2))))

    def test_regularizers_can_be_taken_away(self) -> None:
        model = keras.Sequential([keras.Input((3,)), L.Dense(2, kernel_regularizer="l2")])
        model.compile(loss="mse")
        kernel = model.trainable_variables[0]
        kept = kernel.regularizer
        with keras_layers.without_regularizers([kernel]):
            assert model.losses == []
        assert kernel.regularizer is kept
        assert len(model.losses) == 1

    def test_losses_are_computed_and_tracked(self) -> None:
        model = keras.Sequential([keras.Input((3,)), L.Dense(2)])
        model.compile(loss="mse")
        x, y = data(3), data(2)
        loss = keras_layers.compiled_loss(model, x, y, model(x), None)
        keras_layers.track_loss(model, loss, EXAMPLES)
        assert float(model.get_metrics_result()["loss"]) == pytest.approx(float(loss))
        assert not keras_layers.has_own_compute_loss(model)

    def test_functional_models_are_told_from_subclassed_ones(self) -> None:
        class Own(keras.Model):
            pass

        x = keras.Input((3,))
        assert keras_layers.is_graph_of_layers(keras.Model(x, L.Dense(1)(x)))
        assert keras_layers.is_graph_of_layers(keras.Sequential([L.Dense(1)]))
        assert not keras_layers.is_graph_of_layers(Own(x, L.Dense(1)(x)))
        assert not keras_layers.is_graph_of_layers(L.Dense(1))

    def test_which_losses_are_means_over_examples(self) -> None:
        losses = keras.losses
        for loss in ("mse", "crossentropy", losses.Huber(), losses.huber, losses.CTC()):
            assert keras_layers.is_mean_over_examples(loss, weighted=True)
        mean_by_weight = losses.Huber(reduction="mean_with_sample_weight")
        assert keras_layers.is_mean_over_examples(mean_by_weight, weighted=False)
        for loss in (
            mean_by_weight,
            losses.Dice(),
            "dice",
            losses.Huber(reduction="sum"),
            losses.CosineSimilarity(axis=0),
            losses.SparseCategoricalCrossentropy(ignore_class=0),
            lambda y, p: y - p,
        ):
            assert not keras_layers.is_mean_over_examples(loss, weighted=True)
