"""The replicas that compute layers together, each with a part of the layer's weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from tfdist.strategies.base import Groups, Strategy
from tfdist.strategies.mesh import DATA, MODEL, Mesh

Tensor = Any


@dataclass(frozen=True)
class TeamLinks:
    """The collectives of a team, which is a row of the mesh along its axis `model`.

    Each replica has its own rows of the batch. A team computes a layer for the rows of all its
    members together.

    Attributes:
        strategy: Its collectives do the work.
        ways: Number of replicas of a team.
    """

    strategy: Strategy
    ways: int

    @property
    def mesh(self) -> Mesh:
        """The mesh of all replicas."""
        replicas = self.strategy.place.num_replicas
        return Mesh(((DATA, replicas // self.ways), (MODEL, self.ways)))

    @property
    def _teams(self) -> Groups:
        return self.mesh.groups(MODEL)

    def member(self) -> Tensor:
        """Returns the running replica's number in its team, an int32 or an int."""
        return self.mesh.coordinate(MODEL, self.strategy.replica_id())

    def stack(self, part: Tensor) -> Tensor:
        """Stacks a tensor of every member, shape [ways, ...]."""
        return self.strategy.stack_in_groups(self._teams, part)

    def swap(self, stacked: Tensor) -> Tensor:
        """Sends row i of a tensor to member i, and returns the rows received, [ways, ...]."""
        return self.strategy.swap_in_groups(self._teams, stacked)

    def sum_in_team(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over the team."""
        return self._summed(self._teams, [tensor])[0]

    def sum_over_teams(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sums tensors over the replicas with the same parts of weights."""
        if self.mesh.size_of(DATA) == 1:
            return list(tensors)
        return self._summed(self.mesh.groups(DATA), tensors)

    def is_first_team(self) -> Tensor:
        """Scalar bool: whether the running replica is in the first team."""
        return tf.equal(self.mesh.coordinate(DATA, self.strategy.replica_id()), 0)

    def _summed(self, groups: Groups, tensors: Sequence[Tensor]) -> list[Tensor]:
        if len(groups) == 1:  # a collective of all replicas is the fastest one of a strategy
            return self.strategy.all_reduce_sum(tensors)
        return self.strategy.sum_in_groups(groups, tensors)
