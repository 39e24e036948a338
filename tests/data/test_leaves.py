"""Sparse and ragged leaves: shares hold their rows, and training equals plain Keras's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy import sparse

import tfdist
from tfdist import data
from tfdist.data import leaves
from tfdist.errors import ArgumentError
from tfdist.samplers import Sequential
from tfdist.strategies.base import Place

pytestmark = pytest.mark.quick

ROWS = 23
_random = np.random.default_rng(0)
DENSE = _random.normal(size=(ROWS, 6)).astype("float32")
ZEROS = DENSE * (_random.random((ROWS, 6)) < 0.4)
ZEROS[3] = 0.0  # a row without entries
LENGTHS = _random.integers(1, 6, ROWS)
RAGGED = tf.RaggedTensor.from_row_lengths(_random.integers(0, 20, LENGTHS.sum()), LENGTHS)
SPARSE = tf.sparse.from_dense(ZEROS)
Y = ZEROS.sum(1, keepdims=True)


class Pages(keras.utils.PyDataset):
    def __init__(self, x: Any) -> None:
        super().__init__()
        self.x = x

    def __len__(self) -> int:
        return 3

    def __getitem__(self, page: int) -> Any:
        begin, end = 8 * page, min(8 * page + 8, ROWS)
        if isinstance(self.x, tf.SparseTensor):
            return tf.sparse.from_dense(ZEROS[begin:end]), Y[begin:end]
        return self.x[begin:end], Y[begin:end]


KINDS: dict[str, Callable[[Any], tuple[Any, Any]]] = {
    "arrays": lambda x: (x, Y),
    "dataset": lambda x: (tf.data.Dataset.from_tensor_slices((x, Y)).batch(8), None),
    "py_dataset": lambda x: (Pages(x), None),
    "generator": lambda x: ((Pages(x)[page] for page in range(3)), None),
}
FORMATS: dict[str, Any] = {
    "SparseTensor": SPARSE,
    "RaggedTensor": RAGGED,
    "csr": sparse.csr_matrix(ZEROS.astype("float64")),
    "csc": sparse.csc_matrix(ZEROS),
    "coo": sparse.coo_array(ZEROS),
}


def rows_of(leaf: Any) -> list[Any]:
    if isinstance(leaf, tf.RaggedTensor):
        return leaf.to_list()
    return (leaf if tf.is_tensor(leaf) and not isinstance(leaf, tf.SparseTensor)
            else tf.sparse.to_dense(leaf)).numpy().tolist()  # fmt: skip


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize(
    ("kind", "form"),
    [
        *(("arrays", form) for form in FORMATS),
        *((kind, form) for kind in ("dataset", "py_dataset", "generator")
          for form in ("SparseTensor", "RaggedTensor")),
        ("py_dataset", "csr"),
        ("generator", "csr"),
    ],
)  # fmt: skip
def test_shares_hold_the_rows(kind: str, form: str, replicas: int) -> None:
    expected = RAGGED.to_list() if form == "RaggedTensor" else ZEROS.tolist()
    found: list[list[Any]] = [[] for _ in range(3)]
    for replica in range(replicas):
        x, y = KINDS[kind](FORMATS[form])
        size = 8 if kind == "arrays" else None
        settings = data.SourceSettings(size, None, Sequential(), False, 0, training=False)
        source = data.read(x, y, None, settings)
        for step, share in enumerate(source.shares(Place(replicas, replica))):
            made, _ = share.data
            spec, _ = source.spec()
            assert spec.is_compatible_with(made)
            assert made.shape[1:].as_list() == spec.shape[1:].as_list()
            count = None if share.rows is None else int(share.rows)
            found[step] += rows_of(made)[:count]
    assert found == [expected[begin : begin + 8] for begin in (0, 8, 16)]


def test_rows_are_split_and_fingerprinted() -> None:
    x = {"s": sparse.csr_matrix(ZEROS), "r": RAGGED}
    first, last = data.split(x, Y, None, 0.25)
    for (part, _, _), rows in ((first, slice(0, 17)), (last, slice(17, ROWS))):
        assert rows_of(part["s"]) == ZEROS[rows].tolist()
        assert part["r"].to_list() == RAGGED.to_list()[rows]
    settings = data.SourceSettings(8, None, Sequential(), False, 0, training=False)
    other = RAGGED.with_values(RAGGED.values + 1)
    prints = {
        data.read(changed, Y, None, settings).fingerprint()
        for changed in (x, x | {"r": other}, x | {"s": sparse.csr_matrix(2 * ZEROS)})
    }
    assert len(prints) == 3


def test_a_worker_without_rows_has_one_that_counts_nothing() -> None:
    nothing = sparse.csr_matrix((0, 6), dtype="float32"), RAGGED[:0], DENSE[:0]
    columns = data.columns.to_tensors(nothing, "x")
    blank = [leaves.gather(leaves.blank(column), [0]) for column in columns]
    assert [rows_of(leaf) for leaf in blank] == [[[0.0] * 6], [[]], [[0.0] * 6]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augment": tfdist.Augment(keras.layers.RandomFlip())}, "dense to be augmented"),
        (
            {"privacy": tfdist.DPSGD(1.0, noise_multiplier=1.0, delta=1e-5)},
            "dense in private training",
        ),
    ],
)
def test_what_needs_dense_inputs_says_so(options: Any, message: str) -> None:
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    with pytest.raises(ArgumentError, match=message):
        tfdist.fit(model, SPARSE, Y, verbose=0, **options)


class Mean(keras.layers.Layer):
    def call(self, rows: Any) -> Any:
        return tf.reduce_mean(rows, 1)


def three_inputs() -> Any:
    keras.utils.set_random_seed(1)
    dense, few = keras.Input((6,)), keras.Input((6,), sparse=True)
    some = keras.Input((None,), dtype="int64", ragged=True)
    parts = [
        keras.layers.Dense(2)(dense),
        keras.layers.Dense(3)(few),
        Mean()(keras.layers.Embedding(20, 2)(some)),
    ]
    joined = keras.layers.Concatenate()(parts)
    model = keras.Model([dense, few, some], keras.layers.Dense(1)(joined))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model


def sparse_alone() -> Any:
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((6,), sparse=True), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model


@pytest.mark.parametrize(
    ("build", "x"),
    [
        (three_inputs, (DENSE, sparse.csr_matrix(ZEROS), RAGGED)),
        (sparse_alone, SPARSE),
    ],
)
def test_training_equals_plain_keras_s(build: Callable[[], Any], x: Any) -> None:
    trained = []
    for fit, predict in (
        (keras.Model.fit, keras.Model.predict),
        (tfdist.fit, tfdist.predict),
    ):
        model = build()
        history = fit(model, x, Y, batch_size=8, epochs=2, shuffle=False, verbose=0)
        outputs = predict(model, x, verbose=0)
        trained.append([*model.get_weights(), outputs, history.history["loss"]])
    for ours, plain in zip(*reversed(trained), strict=True):
        np.testing.assert_allclose(ours, plain, 1e-5, 1e-6)
