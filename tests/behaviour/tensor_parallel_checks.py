"""What layers that are computed in parts must do where replicas are; see `checks.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import tfdist
from tests.behaviour.checks import place
from tests.behaviour.registry import HOROVOD, MIRRORED, MIRRORED_4, MULTI_WORKER, check
from tests.equivalence.cases import crossentropy
from tfdist.errors import ArgumentError

L = keras.layers
WORDS, LENGTH, ROWS = 40, 8, 22
SLICES = {
    ".*words/embeddings": ("model", None),
    ".*kinds/embeddings": (None, "model"),
    ".*places/embeddings": ("model", None),
    ".*(self|cross)/(query|key|value)/kernel": (None, "model", None),
    ".*self/(query|key|value)/bias": ("model", None),  # the others' biases are whole
    ".*(self|cross)/attention_output/kernel": ("model", None, None),
    ".*up/kernel": (None, "model"),
    ".*up/bias": ("model",),
    ".*down/kernel": ("model", None),
    ".*alone/kernel": ("model", None),
    ".*wide/kernel": (None, "model"),  # its softmax needs whole rows
    ".*split/kernel": (None, "model", None),
    ".*join/kernel": (None, "model", None),
    ".*dots/kernel": (None, "model"),
    ".*conv/kernel": (None, None, "model"),  # gathered
}


@keras.saving.register_keras_serializable("tests")
class Places(L.Layer):  # type: ignore[misc]
    """Adds what is learnt of each position, which does not depend on the examples."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.table = L.Embedding(LENGTH, 16, name="places")

    def build(self, shape: Any) -> None:
        self.table.build()

    def call(self, inputs: Any) -> Any:
        return inputs + self.table(keras.ops.arange(LENGTH))


def language_model(optimizer: Any) -> Any:
    keras.utils.set_random_seed(7)
    words = keras.Input((LENGTH,), dtype="int32", name="words_in")
    kinds = keras.Input((LENGTH,), dtype="int32", name="kinds_in")
    x = L.Embedding(WORDS, 16, mask_zero=True, name="words")(words)
    x = Places()(x + L.Embedding(4, 16, name="kinds")(kinds))
    attention = L.MultiHeadAttention(4, 4, dropout=0.2, name="self")
    x = L.LayerNormalization()(x + attention(x, x, use_causal_mask=True))
    other = L.Dense(16, "tanh", name="alone")(x)
    allowed = keras.ops.expand_dims(kinds, 1) <= keras.ops.expand_dims(kinds, 2)
    cross, scores = L.GroupQueryAttention(4, 8, 4, name="cross")(
        x, other, attention_mask=allowed, return_attention_scores=True
    )
    x = x + cross + keras.ops.mean(scores, (1, 3))[..., None]
    hidden = L.Dense(32, name="up", kernel_regularizer="l2", bias_regularizer="l1")(x)
    hidden = L.Dropout(0.2)(L.Activation("gelu")(hidden))
    x = x + L.Dense(16, name="down", kernel_constraint="max_norm")(hidden)
    x = x * L.Dense(16, "softmax", name="wide")(x)
    parts = L.EinsumDense("btd,dhk->bthk", (LENGTH, 4, 4), bias_axes="hk", name="split")(x)
    x = x + L.EinsumDense("bthk,khd->btd", (LENGTH, 16), name="join", bias_axes="d")(parts)
    x = x + L.EinsumDense("...d,de->...e", 16, name="dots")(x)
    x = x + L.Conv1D(16, 3, padding="causal", activation="tanh", name="conv")(x)
    model = keras.Model([words, kinds], L.Dense(WORDS, name="head")(x))
    model.compile(optimizer, crossentropy(), weighted_metrics=["accuracy"])
    return model


def small_model(optimizer: Any) -> Any:
    """The layers of a transformer block, with one of each kind that teams compute."""
    keras.utils.set_random_seed(7)
    words = keras.Input((LENGTH,), dtype="int32", name="words_in")
    x = L.Embedding(WORDS, 16, mask_zero=True, name="words")(words)
    attention = L.MultiHeadAttention(4, 4, dropout=0.2, name="self")
    x = x + attention(x, x, use_causal_mask=True)
    hidden = L.Dropout(0.2)(L.Dense(32, "gelu", name="up")(x))
    x = x + L.Dense(16, name="down")(hidden)
    model = keras.Model(words, L.Dense(WORDS, name="head")(x))
    model.compile(optimizer, crossentropy())
    return model


def text(rows: int = ROWS) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    words = rng.integers(1, 12, (rows, LENGTH))  # which repeat
    words[:, 6:] *= rng.integers(0, 2, (rows, 2))
    kinds = np.sort(rng.integers(0, 4, (rows, LENGTH)))
    return [words, kinds], np.roll(words, -1, 1)


def train(optimizer: Any, strategy: Any, **options: Any) -> tuple[Any, Any]:
    model = language_model(optimizer)
    x, y = text()
    options = {"batch_size": 8, "epochs": 2, "seed": 1, "verbose": 0} | options
    history = tfdist.fit(model, x, y, strategy=strategy, validation_data=text(5), **options)
    return model, history.history


def train_small(strategy: Any) -> tuple[Any, Any]:
    model = small_model(sgd())
    (words, _), y = text(14)  # shares of 2, and of 2, 2, 1 and 1
    history = tfdist.fit(
        model, words, y, batch_size=8, epochs=2, seed=1, strategy=strategy, verbose=0
    )
    return model, history.history


def assert_equal(ours: Any, theirs: Any, tolerance: float) -> None:
    for variable, a, b in zip(
        ours[0].variables, ours[0].variables, theirs[0].variables, strict=True
    ):
        if not variable.path.endswith("key/bias"):  # its gradient is 0, but for rounding
            np.testing.assert_allclose(a, b, 0, tolerance, err_msg=variable.path)
    for name, values in ours[1].items():
        np.testing.assert_allclose(values, theirs[1][name], rtol=1e-5, err_msg=name)


def sgd() -> Any:
    return keras.optimizers.SGD(0.1, momentum=0.9)


def mesh(ways: int) -> dict[str, int]:
    return {"batch": place().num_replicas // ways, "model": ways}


@check(MIRRORED_4)
def a_block_in_parts_trains_as_one_process(folder: Path) -> None:
    names = ("words", "up", "down", "self")
    slices = {k: axes for k, axes in SLICES.items() if any(name in k for name in names)}
    ours = train_small(tfdist.ModelParallel(slices, mesh(2)))
    assert_equal(ours, train_small("single"), 2e-6)


@check(full=(MIRRORED_4, MULTI_WORKER, HOROVOD))
def layers_in_parts_train_as_one_process(folder: Path) -> None:
    # The last batches have 6 and 5 rows: shares of 1 and 2, and of 1 and none.
    parallel = tfdist.ModelParallel(SLICES, mesh(2))
    ours = train(sgd(), parallel)
    assert_equal(ours, train(sgd(), "single" if alone() else "auto"), 2e-6)


def alone() -> bool:
    return place().num_workers == 1


@check(full=(MIRRORED_4,))
def all_devices_compute_a_layer_together(folder: Path) -> None:
    def adam() -> Any:
        return keras.optimizers.Adam(0.003, global_clipnorm=0.5, use_ema=True)

    sliced = {k: axes for k, axes in SLICES.items() if "kinds" not in k}
    ours = train(adam(), tfdist.ModelParallel(sliced, mesh(4)))
    assert_equal(ours, train(adam(), "single"), 2e-5)


@check(full=(MIRRORED_4,))
def slices_are_saved_and_resumed_as_whole_weights(folder: Path) -> None:
    parallel = tfdist.ModelParallel("auto", mesh(2))
    expected = train(sgd(), "single")
    for number, (before, after) in enumerate([(parallel, "single"), ("single", parallel)]):
        checkpoint = folder / f"{number}"
        train(sgd(), before, epochs=1, checkpoint=checkpoint)
        model, _ = train(sgd(), after, checkpoint=checkpoint)
        assert_equal((model, {}), expected, 2e-6)


@keras.saving.register_keras_serializable("tests")
class Tied(L.Layer):  # type: ignore[misc]
    """Scores each word by its row of the table, whose rows the embedding has in parts."""

    def __init__(self, table: Any, **options: Any) -> None:
        super().__init__(**options)
        self.table = table

    def call(self, inputs: Any) -> Any:
        return keras.ops.matmul(inputs, keras.ops.transpose(self.table.embeddings))


def adapted_model() -> Any:
    keras.utils.set_random_seed(7)
    words = keras.Input((LENGTH,), dtype="int32")
    table = L.Embedding(WORDS, 16, name="words")
    x = table(words)
    hidden = L.Dense(32, "tanh", name="up")(x)
    model = keras.Model(words, Tied(table)(x + L.Dense(16, name="down")(hidden)))
    model.get_layer("down").enable_lora(2)
    model.compile(sgd(), crossentropy())
    return model


@check(full=(MIRRORED, MIRRORED_4))
def adapters_and_tied_tables_train_as_one_process(folder: Path) -> None:
    (words, _), y = text(14)
    slices = {
        k: axes for k, axes in SLICES.items() if any(n in k for n in ("words", "up", "down"))
    }
    models = [adapted_model(), adapted_model()]
    for model, strategy in zip(
        models, (tfdist.ModelParallel(slices, mesh(2)), "single"), strict=True
    ):
        tfdist.fit(
            model, words, y, batch_size=8, epochs=2, seed=1, strategy=strategy, verbose=0
        )
    assert_equal((models[0], {}), (models[1], {}), 2e-6)


class Slots(keras.callbacks.Callback):  # type: ignore[misc]
    """Counts the bytes of the optimizer's slots on a device while it trains."""

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        _, _, *slots = self.model.optimizer.variables
        self.bytes = sum(4 * int(np.prod(v.shape)) for v in slots)


@check(full=(MIRRORED_4,))
def placement_says_what_each_device_has(folder: Path) -> None:
    parallel = tfdist.ModelParallel(SLICES, mesh(2))
    model = language_model(keras.optimizers.Adam(0.01))
    placed = tfdist.placement(model, parallel)
    by_path = {home.path: home for home in placed.homes}
    kernel = by_path["up/kernel"]
    assert (kernel.layout, kernel.use) == ("(-, model)", "own slice")
    assert kernel.bytes == kernel.state_bytes / 2 == 16 * 32 * 4 / 2
    assert (by_path["conv/kernel"].layout, by_path["conv/kernel"].use) == (
        "4 parts",
        "gathered",
    )
    assert by_path["head/kernel"].bytes == 16 * WORDS * 4  # whole
    counted = Slots()
    tfdist.fit(model, *text(8), strategy=parallel, callbacks=[counted], verbose=0)
    assert counted.bytes == sum(home.state_bytes for home in placed.homes)
    assert f"{placed.bytes_of_each:,}" in str(placed).splitlines()[-1]


@check(MIRRORED_4)
def heads_that_cannot_be_divided_are_refused(folder: Path) -> None:
    inputs = keras.Input((LENGTH, 16))
    model = keras.Model(inputs, L.MultiHeadAttention(6, 4, name="self")(inputs, inputs))
    model.compile("sgd", "mse")
    x = np.ones((8, LENGTH, 16))
    heads = {k: axes for k, axes in SLICES.items() if ".*(self" in k}
    with pytest.raises(ArgumentError, match="'self' with 6 heads over 4"):
        tfdist.fit(model, x, x, strategy=tfdist.ModelParallel(heads, mesh(4)), verbose=0)
