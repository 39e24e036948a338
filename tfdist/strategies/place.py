"""The replicas of a process, and their position among all replicas."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """The replicas of this process, and their position among all replicas.

    Attributes:
        num_replicas: Number of replicas of the model, over all workers.
        first_replica: Global index of this process's first replica.
        local_replicas: Number of replicas of this process.
        num_workers: Number of worker processes.
        worker_index: Index of this process; 0 is the chief.
    """

    num_replicas: int = 1
    first_replica: int = 0
    local_replicas: int = 1
    num_workers: int = 1
    worker_index: int = 0

    @property
    def is_chief(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.worker_index == 0

    def describe(self, batch_size: int | None) -> str:
        """Says how many replicas there are and how a batch is split, in a few words.

        Args:
            batch_size: Number of examples of a full global batch, if known.

        Example:
            >>> Place(num_replicas=2).describe(5)
            '2 replicas, batch 5 = 2 + 3'
        """
        replicas = self.num_replicas
        if replicas == 1:
            return "1 replica"
        if batch_size is None:
            return f"{replicas} replicas"
        edges = [batch_size * r // replicas for r in range(replicas + 1)]
        sizes = [end - begin for begin, end in itertools.pairwise(edges)]
        split = (
            " + ".join(map(str, sizes))
            if replicas <= 4
            else " + ".join(f"{n} x {size}" for size, n in sorted(Counter(sizes).items()))
        )
        return f"{replicas} replicas, batch {batch_size} = {split}"
