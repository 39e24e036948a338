"""A grid of all replicas with named axes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tfdist.errors import ArgumentError

DATA, MODEL, PIPE = "data", "model", "pipe"
AXES = (DATA, MODEL, PIPE)


@dataclass(frozen=True)
class Mesh:
    """Arranges the replicas in a grid. An axis says what differs along it.

    Replicas at different coordinates of `data` get different parts of a batch, of `model`
    different parts of a weight, and of `pipe` different layers. Replicas are counted along
    the last axis first.

    Attributes:
        axes: Names and sizes of the axes. An axis that is left out has size 1.

    Raises:
        ArgumentError: A name is unknown or occurs twice, or a size is below 1.

    Example:
        >>> mesh = Mesh((("data", 2), ("model", 2)))
        >>> mesh.groups("model"), mesh.groups("data")
        (((0, 1), (2, 3)), ((0, 2), (1, 3)))
    """

    axes: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        names = [name for name, _ in self.axes]
        is_grid = all(size >= 1 for _, size in self.axes)
        if len(set(names)) < len(names) or not set(names) <= set(AXES) or not is_grid:
            raise ArgumentError(
                f"A mesh must have distinct axes out of {', '.join(AXES)}, each of a size of "
                f"at least 1. Received: axes={self.axes!r}."
            )

    @property
    def size(self) -> int:
        """Number of replicas."""
        return math.prod(size for _, size in self.axes)

    def size_of(self, axis: str) -> int:
        """Returns the number of replicas along an axis.

        Args:
            axis: The axis's name.
        """
        return dict(self.axes).get(axis, 1)

    def coordinate(self, axis: str, replica: Any) -> Any:
        """Returns where a replica stands on an axis.

        Args:
            axis: The axis's name.
            replica: The replica's global index, an integer or an integer tensor.
        """
        names = [name for name, _ in self.axes]
        if axis not in names:
            return replica * 0
        # Usual: no operations for a replica index that is a tensor.
        if self.size_of(axis) == self.size:
            return replica
        stride = math.prod(size for _, size in self.axes[names.index(axis) + 1 :])
        return replica // stride % self.size_of(axis)

    def groups(self, axis: str) -> tuple[tuple[int, ...], ...]:
        """Lists the groups of replicas that differ in their coordinate on one axis only.

        Args:
            axis: The axis's name.

        Returns:
            The global indices of each group's replicas. Each replica is in one group.
        """
        others = [name for name, _ in self.axes if name != axis]
        groups: dict[tuple[int, ...], list[int]] = {}
        for replica in range(self.size):
            key = tuple(self.coordinate(name, replica) for name in others)
            groups.setdefault(key, []).append(replica)
        return tuple(map(tuple, groups.values()))

    def __str__(self) -> str:
        return " x ".join(f"{name} {size}" for name, size in self.axes)


def data_mesh(replicas: int) -> Mesh:
    """Returns the mesh of plain data parallelism.

    Args:
        replicas: Number of replicas.
    """
    return Mesh(((DATA, replicas),))
