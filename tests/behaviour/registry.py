"""Which check is done where: on each place whose way of doing it differs from the others.

What a check needs of a strategy (sums, gathers, agreements) is checked on every place by
`contract_checks`. So `make test` does most checks on one or two places, and `make test-full`
on all that they name.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

Check = Callable[[Path], None]
CHECKS: dict[str, tuple[Check, tuple[str, ...], tuple[str, ...]]] = {}
"""What is checked, on which places, and on which in `make test-full` only."""

SINGLE, MIRRORED, MIRRORED_4 = "single-1", "mirrored-2", "mirrored-4"
MULTI_WORKER, HOROVOD = "multi_worker-2", "horovod-2"
SERVERS = "parameter_server-2"
WORKERS = (MULTI_WORKER, HOROVOD)
REPLICAS = (MIRRORED, *WORKERS)
EVERYWHERE = (SINGLE, *REPLICAS, SERVERS)


def check(*places: str, full: tuple[str, ...] = ()) -> Callable[[Check], Check]:
    """Adds a function of a folder that all workers share to the checks of some places.

    Args:
        *places: Where it is always done.
        full: Where `make test-full` does it too.
    """

    def add(function: Check) -> Check:
        assert function.__name__ not in CHECKS, function.__name__
        CHECKS[function.__name__] = function, places, full
        return function

    return add
