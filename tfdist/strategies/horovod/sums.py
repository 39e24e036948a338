"""Reductions that Horovod lacks, built from its other collectives."""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

from tfdist.strategies.base import Tensor

Collective = Callable[[Tensor], Tensor]


def sum_bf16(
    tensor: Tensor, ranks: int, all_to_all: Collective, all_gather: Collective
) -> Tensor:
    """Sums bfloat16 tensors in float32. Horovod itself cannot add bfloat16.

    Each rank sums one part of all ranks' tensors. This takes an all-to-all and an
    all-gather, which move as many bytes as a ring all-reduce.

    Args:
        tensor: bfloat16, of the same shape on every rank.
        ranks: Number of ranks.
        all_to_all: Deals out equal parts of a uint16 vector.
        all_gather: Concatenates bfloat16 vectors.
    """
    flat = tf.reshape(tensor, [-1])
    part_size = -(-tf.size(flat) // ranks)
    padded = tf.pad(flat, [[0, part_size * ranks - tf.size(flat)]])
    received = tf.bitcast(all_to_all(tf.bitcast(padded, tf.uint16)), tf.bfloat16)
    parts = tf.cast(tf.reshape(received, [ranks, part_size]), tf.float32)
    part_sum = tf.cast(tf.reduce_sum(parts, 0), tf.bfloat16)
    return tf.reshape(all_gather(part_sum)[: tf.size(flat)], tf.shape(tensor))


def adasum(tensor: Tensor, ranks: int, all_gather: Collective) -> Tensor:
    """Combines the ranks' mean gradients pairwise (Maleki et al., MLSys 2021, algorithm 1).

    Horovod's own Adasum needs MPI. This one gathers the tensors of all ranks, so its cost
    grows with the number of ranks.

    Args:
        tensor: Any float type, of the same shape on every rank.
        ranks: Number of ranks.
        all_gather: Concatenates tensors along axis 0.

    Returns:
        float32 tensor.
    """
    level = tf.unstack(tf.cast(all_gather(tensor[None]), tf.float32), ranks)
    while len(level) > 1:
        pairs = [_combine(a, b) for a, b in zip(level[::2], level[1::2], strict=False)]
        level = pairs + level[len(pairs) * 2 :]
    return level[0]


def _combine(a: Tensor, b: Tensor) -> Tensor:
    # Orthogonal gradients are added. Of equal ones, each keeps a half.
    dot = tf.reduce_sum(a * b)
    overlap_a = tf.math.divide_no_nan(dot, 2.0 * tf.reduce_sum(tf.square(a)))
    overlap_b = tf.math.divide_no_nan(dot, 2.0 * tf.reduce_sum(tf.square(b)))
    return (1.0 - overlap_a) * a + (1.0 - overlap_b) * b
