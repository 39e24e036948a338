"""Maps after `batch`: rows that are kept apart, and rows that are mixed.

What a table says of a map is compared with what the map does to two batches that differ in one
row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfdist._keras.pipelines import misplaced

pytestmark = pytest.mark.quick
ROWS, CHANGED = 4, 2
rng = np.random.default_rng(0)
X = rng.normal(size=(ROWS, 4, 4, 3)).astype("float32")
Y = np.int32([1, 0, 2, 1])
WORDS = np.array(["a b", "b", "c", "a"])
Map = Callable[[Any, Any, Any], Any]
LOOKUP = keras.layers.StringLookup(vocabulary=["a", "b"])
SCALE = tf.Variable([1.0, 2.0, 3.0])


def as_many_rows_as_columns(x: Any, y: Any, w: Any) -> Any:
    rows = tf.reshape(x, [tf.shape(x)[0], -1])
    return tf.reshape(rows, [tf.shape(rows)[1], -1])


APART: dict[str, Map] = {
    "rescaled": lambda x, y, w: (tf.cast(x, tf.float16) / 255, tf.one_hot(y, 3)),
    "standardized": lambda x, y, w: tf.image.per_image_standardization(x),
    "resized": lambda x, y, w: tf.image.resize(x, [2, 2]),
    "variable": lambda x, y, w: tf.ensure_shape(x, [4, 4, 4, 3]) * SCALE,
    "one_row": lambda x, y, w: x + tf.ones([1, 4, 4, 3]),
    "slices": lambda x, y, w: (x[..., 0], x[:, 1:, ::-1], x[:, None, ..., 0], y[:, None]),
    "shape": lambda x, y, w: tf.reshape(x, [tf.shape(x)[0], -1]),
    "reshape": lambda x, y, w: tf.reshape(x, [-1, 16, 3]) @ tf.ones([3, 2]),
    "ones": lambda x, y, w: tf.concat([x, tf.ones([tf.shape(x)[0], 4, 4, 1])], -1),
    "ones_like": lambda x, y, w: tf.stack([x, tf.ones_like(x)], 1),
    "axes": lambda x, y, w: (tf.cumsum(x, 1), tf.reverse(x, [2]), tf.argmax(x, -1)),
    "roll": lambda x, y, w: tf.roll(x, [1, 1], [1, -1]),
    "parts": lambda x, y, w: (*tf.split(x, 2, 1), *tf.unstack(x, axis=3), tf.stack([y, y], 1)),
    "padded": lambda x, y, w: tf.pad(x, [[0, 0], [1, 1], [0, 0], [0, 0]]),
    "tiled": lambda x, y, w: tf.tile(x, [1, 2, 1, 1]),
    "transposed": lambda x, y, w: tf.transpose(x, [0, 3, 1, 2]),
    "top": lambda x, y, w: (tf.math.top_k(x, 2).values, tf.nn.softmax(x)),
    "table": lambda x, y, w: tf.gather([0.5, 1.0, 2.0], y),
    "words": lambda x, y, w: (LOOKUP(w), tf.strings.length(tf.strings.lower(w))),
    "function": tf.function(lambda x, y, w: x - tf.reduce_mean(x, 1, keepdims=True)),
    "contrast": lambda x, y, w: tf.image.adjust_contrast(x, 2.0),
}  # fmt: skip
MIXED: dict[str, Map] = {
    "function": tf.function(lambda x, y, w: x - tf.reduce_mean(x, 0)),
    "cumsum": lambda x, y, w: tf.cumsum(x, 0),
    "negative_axis": lambda x, y, w: tf.cumsum(x, -4),
    "reverse": lambda x, y, w: x + tf.reverse(x, [1, 0]),
    "roll": lambda x, y, w: x + tf.roll(x, [1, 1], [1, 0]),
    "sort": lambda x, y, w: tf.sort(y),
    "top": lambda x, y, w: tf.math.top_k(tf.tile(y, [1]), 4).values,
    "softmax": lambda x, y, w: tf.nn.softmax(tf.cast(y, tf.float32)),
    "transposed_twice": lambda x, y, w: tf.transpose(tf.cumsum(tf.transpose(x), 3)),
    "folded": lambda x, y, w: tf.reduce_sum(tf.reshape(x, [2, -1]), 1)[:1] + tf.ones([4, 1]),
    "two_rows_in_one": lambda x, y, w: tf.reduce_sum(tf.reshape(x, [-1, 96]), 1),
    "as_many_rows_as_columns": as_many_rows_as_columns,
    "row_by_column": lambda x, y, w: y[:, None] * y,
    "tiled": lambda x, y, w: tf.tile(y, [2]),
    "padded": lambda x, y, w: tf.pad(y, [[1, 0]])[:-1],
    "stacked": lambda x, y, w: tf.reduce_sum(tf.stack([x, x]), 1),
    "unstacked": lambda x, y, w: tf.unstack(x, 4)[0],
    "split": lambda x, y, w: tf.concat(tf.split(x, 4)[::-1], 0),
    "concatenated": lambda x, y, w: tf.concat([y, y], 0),
    "gathered": lambda x, y, w: tf.gather(y, y),
    "sliced": lambda x, y, w: x[1:],
    "reversed": lambda x, y, w: y[::-1],
    "chosen": lambda x, y, w: x[y[0]],
    "product": lambda x, y, w: tf.matmul(x[:, 0, 0], x[:, 0, 1], transpose_b=True),
    "transposed": lambda x, y, w: tf.matmul(x[:, 0, 0], tf.ones([4, 2]), transpose_a=True),
    "contrast": lambda x, y, w: tf.image.adjust_contrast(x[..., 0], 2.0),
    "table_of_rows": lambda x, y, w: tf.gather(x, [2, 0, 2, 1]),
    "top_of_rows": lambda x, y, w: y + tf.math.top_k(y, 4).values,
    "einsum": lambda x, y, w: tf.einsum("bi,ci->bc", x[:, 0, 0], x[:, 0, 0]),
    "einsum_with_constant": lambda x, y, w: tf.einsum("bi,bc->ic", x[:, 0, 0], tf.ones([4, 4])),
    "segments": lambda x, y, w: tf.gather(tf.math.unsorted_segment_sum(y, y, 3), y),
    "branch": lambda x, y, w: tf.cond(tf.reduce_any(y > 1), lambda: x, lambda: -x),
    "loop": lambda x, y, w: tf.map_fn(lambda row: row + tf.cast(y[2], tf.float32), x),
    "shape_of_another": lambda x, y, w: tf.reshape(x, [tf.shape(x)[1], -1])[:, ::-1],
    "of_words": lambda x, y, w: tf.strings.reduce_join(w),
    "longest": lambda x, y, w: tf.strings.split(w).to_tensor(),
}  # fmt: skip


def batches(function: Map) -> Any:
    data = tf.data.Dataset.from_tensor_slices((X, Y, WORDS))
    return data.batch(ROWS).map(function)


@pytest.mark.parametrize("name", APART)
def test_rows_that_are_kept_apart_pass(name: str) -> None:
    function = APART[name]
    assert misplaced(batches(function), promised=False) is None
    x, y, w = X.copy(), Y.copy(), WORDS.copy()
    x[CHANGED], y[CHANGED], w[CHANGED] = 9.0, 0, "b b"
    before, after = (
        tf.nest.flatten(function(*map(tf.constant, b))) for b in ((X, Y, WORDS), (x, y, w))
    )
    others = [row for row in range(ROWS) if row != CHANGED]
    for one, other in zip(before, after, strict=True):
        assert len(one) == ROWS
        assert np.array_equal(one.numpy()[others], other.numpy()[others])


@pytest.mark.parametrize("name", MIXED)
def test_rows_that_are_mixed_are_refused(name: str) -> None:
    found = misplaced(batches(MIXED[name]), promised=True)
    assert found is not None
    assert "in which a row may depend on others" in found[0]


def test_examples_are_parsed_after_batch_unless_they_are_padded_to_the_longest() -> None:
    texts = tf.data.Dataset.from_tensor_slices([b""] * 8).batch(4)

    def parse(feature: Any) -> Any:
        return misplaced(texts.map(lambda t: tf.io.parse_example(t, {"a": feature})), True)

    assert parse(tf.io.FixedLenFeature([2], tf.float32, [0.0, 0.0])) is None
    longest = tf.io.FixedLenSequenceFeature([], tf.float32, allow_missing=True)
    assert "ParseExampleV2" in str(parse(longest))


def test_a_table_of_whole_batches_is_refused() -> None:
    """A key is a vector of as many numbers as a batch has rows."""
    table = tf.lookup.experimental.DenseHashTable(tf.int32, tf.int32, 0, [-1] * 4, [-2] * 4)

    def find(x: Any, y: Any, w: Any) -> Any:
        given = {"table_handle": table.resource_handle, "default_value": 0}
        return y + tf.raw_ops.LookupTableFindV2(keys=y, **given)

    assert "LookupTableFindV2" in str(misplaced(batches(find), promised=True))
