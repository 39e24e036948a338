"""Which check is done where: on each place whose way of doing it differs from the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

Check = Callable[[Path], None]
CHECKS: dict[str, tuple[Check, tuple[str, ...]]] = {}
"""What is checked, and on which places."""

SINGLE, MIRRORED = "single-1", "mirrored-2"
MULTI_WORKER, HOROVOD = "multi_worker-2", "horovod-2"
SERVERS = "parameter_server-2"
WORKERS = (MULTI_WORKER, HOROVOD)
REPLICAS = (MIRRORED, *WORKERS)
EVERYWHERE = (SINGLE, *REPLICAS, SERVERS)


def check(*places: str) -> Callable[[Check], Check]:
    """Adds a function of a folder that all workers share to the checks of some places."""

    def add(function: Check) -> Check:
        assert function.__name__ not in CHECKS, function.__name__
        CHECKS[function.__name__] = function, places
        return function

    return add
