"""The collectives of a strategy. The defaults fit a single process."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tfdist.strategies.gathered_groups import Groups, gather_in_group, sum_in_group
from tfdist.strategies.place import Place

Tensor = Any


class Collectives(abc.ABC):
    """What a function in a replica can call, to exchange tensors with the other replicas.

    Attributes:
        place: The replicas of this process.
    """

    place: Place

    def replica_id(self) -> Tensor:
        """The global index of the running replica, a scalar int32 tensor or an int."""
        return self.place.first_replica

    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sums each tensor over all replicas. Every replica gets the result.

        Args:
            tensors: Dense tensors of any dtypes, or `tf.IndexedSlices`.
        """
        return list(tensors)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Concatenates a tensor of every replica along axis 0, in the replicas' order.

        Args:
            tensor: Shape [rows, ...]; `rows` may differ between replicas.
        """
        return tensor

    def sum_along(self, axis: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sums each tensor over the replicas that differ on one axis of the mesh only.

        Args:
            axis: The axis's name, as in `Mesh`.
            tensors: As in `all_reduce_sum`.
        """
        size = self.place.mesh.size_of(axis)
        if size == 1:
            return list(tensors)
        # A collective of all replicas is the fastest one of a strategy.
        if size == self.place.num_replicas:
            return self.all_reduce_sum(tensors)
        return self.sum_in_groups(self.place.mesh.groups(axis), tensors)

    def gather_along(self, axis: str, tensor: Tensor) -> Tensor:
        """Concatenates a tensor of every replica that differs on one axis of the mesh only.

        Args:
            axis: The axis's name, as in `Mesh`.
            tensor: As in `all_gather`.
        """
        size = self.place.mesh.size_of(axis)
        if size == 1:
            return tensor
        if size == self.place.num_replicas:
            return self.all_gather(tensor)
        return self.gather_in_groups(self.place.mesh.groups(axis), tensor)

    def sum_in_groups(self, groups: Groups, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sums each tensor over the replicas of a group. Every replica must call it.

        A subclass overrides this if it can reduce in groups. Here all replicas gather.

        Args:
            groups: The global indices of each group's replicas; each replica is in one group,
                and the groups have equal sizes.
            tensors: As in `all_reduce_sum`.
        """
        replica = self.replica_id()
        return [sum_in_group(t, groups, replica, self.all_gather) for t in tensors]

    def gather_in_groups(self, groups: Groups, tensor: Tensor) -> Tensor:
        """Concatenates a tensor of every replica of a group. Every replica must call it.

        A subclass overrides this if it can gather in groups. Here all replicas gather.

        Args:
            groups: As in `sum_in_groups`.
            tensor: As in `all_gather`.
        """
        return gather_in_group(tensor, groups, self.replica_id(), self.all_gather)

    def sum_of_part(self, stacked: Tensor) -> Tensor:
        """Sums a tensor over all replicas. Each replica gets its own row of the sum.

        Args:
            stacked: Shape [num_replicas, elements], the same on every replica.

        Returns:
            Shape [elements].
        """
        # Right for any strategy, but no faster than an all-reduce.
        (summed,) = self.all_reduce_sum([stacked])
        return summed[self.replica_id()]

    def gather_parts(self, part: Tensor) -> Tensor:
        """Stacks a tensor of every replica, in the replicas' order.

        Args:
            part: Shape [elements], the same on every replica.

        Returns:
            Shape [num_replicas, elements].
        """
        return tf.reshape(self.all_gather(part), [self.place.num_replicas, -1])

    def stack_in_groups(self, groups: Groups, part: Tensor) -> Tensor:
        """Stacks a tensor of every replica of a group. Every replica must call it.

        Args:
            groups: As in `sum_in_groups`.
            part: A tensor of the same shape on every replica.

        Returns:
            Shape [size of the group, ...], in the group's order.
        """
        return self.gather_in_groups(groups, part[None])

    def swap_in_groups(self, groups: Groups, stacked: Tensor) -> Tensor:
        """Sends each row of a tensor to one replica of the group. Every replica must call it.

        Args:
            groups: As in `sum_in_groups`.
            stacked: Shape [size of the group, ...], the same on every replica.

        Returns:
            The rows that the replica has received, in the senders' order.
        """
        # Right for any strategy, but it moves more than an all-to-all.
        everything = self.stack_in_groups(groups, stacked)
        position = {member: at for group in groups for at, member in enumerate(group)}
        own = tf.gather([position[member] for member in sorted(position)], self.replica_id())
        return tf.gather(everything, own, axis=1)

    @property
    def everyone(self) -> Groups:
        """One group of all replicas."""
        return (tuple(range(self.place.num_replicas)),)

    def sum_in_branch(self, tensor: Tensor) -> Tensor:
        """Sums a dense tensor over all replicas. All of them must be in the same branch.

        Args:
            tensor: A small tensor. The call may be in a branch of a conditional.
        """
        return self.sum_in_groups(self.everyone, [tensor])[0]
