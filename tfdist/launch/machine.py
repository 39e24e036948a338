"""The memory and the GPUs of this machine."""

from __future__ import annotations

import os
from collections.abc import Mapping

from tfdist.launch.programs import nvidia_smi
from tfdist.launch.resources import visible_gpus
from tfdist.watchdog.memory import left_mib

_MIB = 2**20
_UNKNOWN = 2**60


def usable_memory() -> int:
    """Returns how many bytes of memory this machine has, or this container may use.

    A very large number if the system does not say.
    """
    found = left_mib()
    return _UNKNOWN if found is None else found[1] * _MIB


def gpus_with_memory(environ: Mapping[str, str] = os.environ) -> tuple[tuple[str, int], ...]:
    """Lists the GPUs that this process may use: the model of each, and its bytes of memory.

    Args:
        environ: The environment variables.
    """
    count = len(visible_gpus(environ))
    if not count:
        return ()
    query = ("--query-gpu=name,memory.total", "--format=csv,noheader,nounits")
    return read_gpus(nvidia_smi(environ, *query))[:count]


def read_gpus(text: str) -> tuple[tuple[str, int], ...]:
    """Reads the table of `nvidia-smi`.

    Args:
        text: A line for each GPU: its name, and MiB of memory.

    Example:
        >>> read_gpus("NVIDIA A100-SXM4-40GB, 40960")
        (('NVIDIA A100-SXM4-40GB', 42949672960),)
    """
    gpus = []
    for line in text.splitlines():
        name, _, mebibytes = line.rpartition(",")
        if mebibytes.strip().isdecimal():
            gpus.append((name.strip(), int(mebibytes) * _MIB))
    return tuple(gpus)
