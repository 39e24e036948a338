"""Sums and gathers among some of the replicas, built from a gather of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

Tensor = Any
Groups = Sequence[Sequence[int]]
Gather = Callable[[Tensor], Tensor]


def gather_in_group(tensor: Tensor, groups: Groups, replica: Tensor, gather: Gather) -> Tensor:
    """Concatenates a tensor of every replica of a group along axis 0.

    Args:
        tensor: Shape [rows, ...]; `rows` may differ between replicas.
        groups: The global indices of each group's replicas; each replica is in one group, and
            the groups have equal sizes.
        replica: The global index of the running replica.
        gather: Concatenates a tensor of all replicas.
    """
    rows = tf.shape(tensor)[:1]
    # TensorFlow folds constants, and with them Horovod's collectives, in any order: ranks
    # would wait for each other. It does not fold what may be fed.
    rows = tf.raw_ops.PlaceholderWithDefault(input=rows, shape=[1])
    sizes, gathered = gather(rows), gather(tensor)
    starts = tf.cumsum(sizes, exclusive=True)
    own_group = tf.unstack(_members(groups, replica))
    return tf.concat([gathered[starts[r] : starts[r] + sizes[r]] for r in own_group], 0)


def sum_in_group(tensor: Tensor, groups: Groups, replica: Tensor, gather: Gather) -> Tensor:
    """Sums a tensor over the replicas of a group.

    Args:
        tensor: Dense, or `tf.IndexedSlices`.
        groups: As in `gather_in_group`.
        replica: As in `gather_in_group`.
        gather: As in `gather_in_group`.
    """
    if isinstance(tensor, tf.IndexedSlices):
        values = gather_in_group(tensor.values, groups, replica, gather)
        indices = gather_in_group(tensor.indices, groups, replica, gather)
        return tf.IndexedSlices(values, indices, tensor.dense_shape)
    return tf.reduce_sum(tf.gather(gather(tensor[None]), _members(groups, replica)), 0)


def _members(groups: Groups, replica: Tensor) -> Tensor:
    """Returns the global indices of the running replica's group."""
    of_replica = {member: list(group) for group in groups for member in group}
    return tf.gather([of_replica[member] for member in sorted(of_replica)], replica)
