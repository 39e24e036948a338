"""The resources that the workers on one machine share: its cores and its GPUs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from tfdist.errors import LaunchError
from tfdist.launch.programs import nvidia_smi

_THREAD_POOLS = ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS")


def usable_cores() -> int:
    """Returns how many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def killed_for_memory() -> int | None:
    """Returns how many processes this machine's kernel has killed because memory ran out.

    Those of containers with a limit of memory count too. None if the kernel does not say.
    """
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return None
    counts = [line.split()[1] for line in lines if line.startswith("oom_kill ")]
    return int(counts[0]) if counts else None


def thread_environment(local_workers: int, environ: Mapping[str, str]) -> dict[str, str]:
    """Sizes a worker's thread pools so that all workers together fit the machine's cores.

    Args:
        local_workers: How many workers run on this machine.
        environ: The launcher's variables; a size that the user set there stays.

    Returns:
        The variables to set in each worker.
    """
    threads = str(max(1, usable_cores() // local_workers))
    return {name: threads for name in _THREAD_POOLS if name not in environ}


def crowded_cores(local_workers: int, cores: int | None = None) -> str:
    """Returns a warning if this machine has fewer cores than workers; empty otherwise.

    Args:
        local_workers: How many workers that compute on the processor run on this machine.
        cores: The cores that they may use; by default those of this process.
    """
    cores = usable_cores() if cores is None else cores
    if local_workers <= max(1, cores):
        return ""
    cores_text = "1 core" if cores == 1 else f"{cores} cores"
    return (
        f"tfdist: warning: {local_workers} workers share {cores_text} of this machine. More "
        f"than {cores} do not make training faster."
    )


def visible_gpus(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Lists the GPUs that the launcher's own environment allows.

    Args:
        environ: The launcher's variables.

    Returns:
        The entries of CUDA_VISIBLE_DEVICES; if it is not set, the numbers of the GPUs that
        `nvidia-smi` lists. Empty if there is no GPU.
    """
    if "CUDA_VISIBLE_DEVICES" in environ:
        gpus: list[str] = []
        for entry in environ["CUDA_VISIBLE_DEVICES"].split(","):
            # CUDA ignores everything from the first invalid entry on.
            if entry.strip() in ("", "-1", "NoDevFiles", "none", "void"):
                break
            gpus.append(entry.strip())
        return tuple(gpus)
    listing = nvidia_smi(environ, "-L")
    return tuple(str(i) for i in range(sum(x.startswith("GPU ") for x in listing.splitlines())))


def gpu_environments(gpus: Sequence[str], local_workers: int) -> tuple[dict[str, str], ...]:
    """Splits the GPUs evenly between the workers of this machine.

    Args:
        gpus: The GPUs, as CUDA_VISIBLE_DEVICES names them.
        local_workers: How many workers run on this machine.

    Returns:
        The variables to set for each worker; none if there is nothing to split. All workers
        get the same number of GPUs, and the remaining GPUs stay idle.

    Raises:
        LaunchError: There are GPUs, but fewer than workers.

    Example:
        >>> gpu_environments(["0", "1", "2", "3"], 2)
        ({'CUDA_VISIBLE_DEVICES': '0,1'}, {'CUDA_VISIBLE_DEVICES': '2,3'})
    """
    if not gpus or local_workers == 1:
        return ({},) * local_workers
    gpus_per_worker = len(gpus) // local_workers
    if gpus_per_worker == 0:
        plural = "" if len(gpus) == 1 else "s"
        raise LaunchError(
            "Each worker of a machine with GPUs must get a GPU of its own. "
            f"Received: {local_workers} workers and {len(gpus)} GPU{plural}, number "
            f"{', '.join(gpus)}. Start {len(gpus)} worker{plural}, or train on the processor "
            "by setting CUDA_VISIBLE_DEVICES=-1."
        )
    return tuple(
        {
            "CUDA_VISIBLE_DEVICES": ",".join(
                gpus[i * gpus_per_worker : (i + 1) * gpus_per_worker]
            )
        }
        for i in range(local_workers)
    )
