"""Does a check where it is; it raises what it finds wrong."""

from __future__ import annotations

from pathlib import Path

from tests.behaviour import (
    checkpoint_checks,  # noqa: F401, they register themselves
    checks,  # noqa: F401
    compression_checks,  # noqa: F401
    contract_checks,  # noqa: F401
    deferred_checks,  # noqa: F401
    federated_checks,  # noqa: F401
    horovod_checks,  # noqa: F401
    local_checks,  # noqa: F401
    pipeline_checks,  # noqa: F401
    privacy_checks,  # noqa: F401
    server_checks,  # noqa: F401
    tensor_parallel_checks,  # noqa: F401
    zero_checks,  # noqa: F401
)
from tests.behaviour.registry import CHECKS


def do(name: str, folder: Path) -> None:
    function, *_ = CHECKS[name]
    function(folder)
