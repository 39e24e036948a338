"""Which tensors travel in one collective, and in which order."""

from __future__ import annotations

import pytest
import tensorflow as tf

from tfdist.strategies.packing import packs_of, reduce_packed

pytestmark = pytest.mark.quick


def tensors() -> list[tf.Tensor]:
    """Gradients of 40, 12, 8 and 8 bytes, another type's, rows, and signals of 4 bytes."""
    rows = tf.IndexedSlices(tf.ones([1, 2]), tf.constant([0]), tf.constant([9, 2]))
    sizes = [10, 3, 2, 2]
    return [*map(tf.ones, sizes), tf.ones([2], tf.int32), rows, tf.ones([1])]


def test_tensors_that_fit_travel_together() -> None:
    assert sorted(map(sorted, packs_of(tensors(), pack_bytes=1000))) == [
        [0, 1, 2, 3, 6],
        [4],
        [5],
    ]


def test_packs_are_bounded_and_in_the_order_of_the_backward_pass() -> None:
    # 4 + 8 + 8 bytes fill the first pack, and what is larger than a pack travels alone.
    assert packs_of(tensors(), pack_bytes=20) == [[5], [4], [6, 3, 2], [1], [0]]


def test_a_tensor_of_unknown_size_is_packed() -> None:
    sizes = []

    @tf.function(input_signature=[tf.TensorSpec([None]), tf.TensorSpec([2])])
    def double(unknown: tf.Tensor, known: tf.Tensor) -> list[tf.Tensor]:
        def reduce(tensor: tf.Tensor) -> tf.Tensor:
            sizes.append(tensor.shape.rank)
            return tensor * 2

        return reduce_packed([unknown, known], reduce, pack_bytes=8)

    assert [list(t.numpy()) for t in double(tf.ones([3]), tf.ones([2]))] == [[2] * 3, [2] * 2]
    assert sizes == [1]
