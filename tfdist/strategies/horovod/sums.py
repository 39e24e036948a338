"""Sums over ranks that Horovod does not have, made of those collectives that it has."""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

from tfdist.strategies.base import Tensor

Collective = Callable[[Tensor], Tensor]


def sum_bf16(
    tensor: Tensor, ranks: int, all_to_all: Collective, all_gather: Collective
) -> Tensor:
    """Sums in float32 what travels as bfloat16, which Horovod cannot add.

    Each rank adds up its part of all ranks' tensors: an all-to-all and an all-gather, as
    many bytes as a ring's all-reduce.

    Args:
        tensor: bfloat16, of the same shape on every rank.
        ranks: How many there are.
        all_to_all: Deals out equal parts of a uint16 vector.
        all_gather: Concatenates bfloat16 vectors.
    """
    flat = tf.reshape(tensor, [-1])
    part = -(-tf.size(flat) // ranks)
    padded = tf.pad(flat, [[0, part * ranks - tf.size(flat)]])
    received = tf.bitcast(all_to_all(tf.bitcast(padded, tf.uint16)), tf.bfloat16)
    parts = tf.cast(tf.reshape(received, [ranks, part]), tf.float32)
    mine = tf.cast(tf.reduce_sum(parts, 0), tf.bfloat16)
    return tf.reshape(all_gather(mine)[: tf.size(flat)], tf.shape(tensor))


def adasum(tensor: Tensor, ranks: int, all_gather: Collective) -> Tensor:
    """Combines the ranks' mean gradients pairwise (Maleki et al., MLSys 2021, algorithm 1).

    Horovod's own needs MPI. This one gathers, which costs as many times the tensor as there
    are ranks.

    Args:
        tensor: Any float type, of the same shape on every rank.
        ranks: How many there are.
        all_gather: Concatenates tensors along axis 0.

    Returns:
        float32 tensor.
    """
    level = tf.unstack(tf.cast(all_gather(tensor[None]), tf.float32), ranks)
    while len(level) > 1:
        pairs = [_pair(a, b) for a, b in zip(level[::2], level[1::2], strict=False)]
        level = pairs + level[len(pairs) * 2 :]
    return level[0]


def _pair(a: Tensor, b: Tensor) -> Tensor:
    dot = tf.reduce_sum(a * b)
    of_a = tf.math.divide_no_nan(dot, 2.0 * tf.reduce_sum(tf.square(a)))
    of_b = tf.math.divide_no_nan(dot, 2.0 * tf.reduce_sum(tf.square(b)))
    return (1.0 - of_a) * a + (1.0 - of_b) * b
