"""The ranks that `horovodrun` and `mpirun` give to the processes that they start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from tfdist.cluster.environment import whole_number
from tfdist.cluster.jobs import shortened
from tfdist.errors import ClusterError

# The variables of the rank and of the number of processes, and one that must be set too.
_HOROVOD = ("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_RANK")
_OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")
_MPICH = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID")  # SLURM's srun may set the first two


class RankAndSize(NamedTuple):
    """The rank of a process, and how many processes were started together.

    Attributes:
        rank: The number of this process.
        size: How many processes there are.
    """

    rank: int
    size: int


def from_horovod(environ: Mapping[str, str]) -> RankAndSize | None:
    """Reads the rank that `horovodrun` gave this process, if it did.

    Args:
        environ: The environment variables.

    Raises:
        ClusterError: The variables cannot be read.
    """
    return _rank_and_size(environ, _HOROVOD)


def from_mpi(environ: Mapping[str, str]) -> RankAndSize | None:
    """Reads the rank that `mpirun` gave this process, if it did.

    Args:
        environ: The environment variables.

    Raises:
        ClusterError: The variables cannot be read.
    """
    return _rank_and_size(environ, _OPEN_MPI) or _rank_and_size(environ, _MPICH)


def _rank_and_size(
    environ: Mapping[str, str], names: tuple[str, str, str]
) -> RankAndSize | None:
    if not all(name in environ for name in names):
        return None
    (rank_name, rank_text), (size_name, size_text) = ((n, environ[n]) for n in names[:2])
    rank, size = whole_number(rank_text), whole_number(size_text)
    if rank is None or size is None or rank >= size:
        raise ClusterError(
            f"`{rank_name}` must be a whole number from 0 to `{size_name}` - 1. Received: "
            f"{rank_name}={shortened(rank_text)}, {size_name}={shortened(size_text)}. "
            "They are set by the launcher; unset both to train in one process."
        )
    return RankAndSize(rank, size)
