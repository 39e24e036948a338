"""Cuts against NumPy: parts are runs of elements, in the replicas' order."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tfdist.errors import ArgumentError
from tfdist.sharding.cuts import Cut, cut_of
from tfdist.strategies.zero import Zero

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("shape", [(100,), (97, 5), (3, 7, 5), (48, 4)])
def test_a_tensor_is_cut_in_order_and_joined(shape, parts):
    cut = cut_of(shape, parts)
    whole = np.arange(1, np.prod(shape) + 1, dtype="float32").reshape(shape)
    own = [cut.own(tf.constant(whole), number).numpy() for number in range(parts)]
    flat = np.concatenate([part.ravel() for part in own])
    np.testing.assert_array_equal(flat[: whole.size], whole.ravel())
    assert not flat[whole.size :].any()
    assert {part.shape for part in own} == {cut.part_shape}
    assert cut.part_size * parts <= whole.size * 1.1 + parts
    stacked = cut.stacked(tf.constant(whole))
    np.testing.assert_array_equal(stacked, flat.reshape(parts, -1))
    np.testing.assert_array_equal(cut.joined(stacked), whole)
    np.testing.assert_array_equal(cut.joined_arrays(own), whole)


@pytest.mark.parametrize("shape", [(97, 5), (9, 5)])  # by rows, and by elements
def test_rows_of_a_sparse_gradient_go_to_their_replica_each_as_often_as_it_comes(shape):
    rng = np.random.default_rng(0)
    indices = rng.integers(0, shape[0], 40)
    slices = tf.IndexedSlices(rng.normal(size=(40, 5)), indices, shape)
    cut = Cut(shape, 2)
    own = [cut.own_rows(slices, number) for number in range(2)]
    dense = [tf.convert_to_tensor(part).numpy() for part in own]
    np.testing.assert_allclose(cut.joined_arrays(dense), tf.convert_to_tensor(slices))
    squares = [tf.reduce_sum(part.values**2) for part in own]  # as Adam squares them
    np.testing.assert_allclose(sum(squares), tf.reduce_sum(slices.values**2))


def test_what_is_small_stays_whole():
    assert cut_of((10,), 2) is None
    assert cut_of((), 2) is None


def test_zero_says_what_is_not_there():
    for stage in (0, 2, 4, True, "1"):
        with pytest.raises(ArgumentError, match="`stage` must be 1"):
            Zero(stage)
    with pytest.raises(ArgumentError, match="`on` must be"):
        Zero(on=Zero())
