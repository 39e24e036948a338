"""The replicas of a process, and their position among all replicas."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from typing import Any

from tfdist.errors import ArgumentError
from tfdist.strategies.mesh import DATA, Mesh, data_mesh

_UNNAMED = Mesh(())


@dataclass(frozen=True)
class Place:
    """The replicas of this process, and their position among all replicas.

    Attributes:
        num_replicas: Number of replicas, over all workers. Each runs the step on one device.
        first_replica: Global index of this process's first replica.
        local_replicas: Number of replicas of this process.
        num_workers: Number of worker processes.
        worker_index: Index of this process; 0 is the chief.
        mesh: The axes along which the replicas are arranged. By default there is one, `data`.

    Raises:
        ArgumentError: The mesh has another number of replicas.
    """

    num_replicas: int = 1
    first_replica: int = 0
    local_replicas: int = 1
    num_workers: int = 1
    worker_index: int = 0
    mesh: Mesh = _UNNAMED

    def __post_init__(self) -> None:
        # A default that depends on another field, in a frozen class.
        if not self.mesh.axes:
            object.__setattr__(self, "mesh", data_mesh(self.num_replicas))
        if self.mesh.size != self.num_replicas:
            raise ArgumentError(
                "A mesh must have a place for each replica. Received: "
                f"{self.num_replicas} replicas and the mesh {self.mesh}."
            )

    @property
    def num_shares(self) -> int:
        """Number of parts of a global batch: the size of the axis `data`."""
        return self.mesh.size_of(DATA)

    def share_of(self, replica: Any) -> Any:
        """Returns which part of a global batch a replica gets.

        Args:
            replica: The replica's global index, an integer or an integer tensor.
        """
        return self.mesh.coordinate(DATA, replica)

    @property
    def is_chief(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.worker_index == 0

    def describe(self, batch_size: int | None) -> str:
        """Returns how many replicas there are and how a batch is split, in a few words.

        Args:
            batch_size: Number of examples of a full global batch, if known.

        Example:
            >>> Place(num_replicas=2).describe(5)
            '2 replicas, batch 5 = 2 + 3'
        """
        if self.num_replicas == 1:
            return "1 replica"
        shares = self.num_shares
        replicas = f"{self.num_replicas} replicas"
        if shares < self.num_replicas:
            replicas += f" ({self.mesh})"
        if batch_size is None:
            return replicas
        # As `data.source.bounds` cuts a batch.
        edges = [batch_size * share // shares for share in range(shares + 1)]
        sizes = [end - begin for begin, end in itertools.pairwise(edges)]
        split = (
            " + ".join(map(str, sizes))
            if shares <= 4
            else " + ".join(f"{n} x {size}" for size, n in sorted(Counter(sizes).items()))
        )
        return f"{replicas}, batch {batch_size} = {split}"
