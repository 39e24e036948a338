"""Makes the launchers of several machines one: what they compare, and where they meet."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from tfdist._version import __version__
from tfdist.errors import LaunchError
from tfdist.launch.client import CoordinatorClient
from tfdist.launch.coordinator import Coordinator
from tfdist.launch.hosts import Host
from tfdist.launch.restarts import Restarts

_COMPARED = ("tensorflow", "keras", "horovod")

NODE_TIMEOUT_S = 600.0
"""Seconds that a machine may take to come, or to come back."""


@contextlib.contextmanager
def joined(
    hosts: Sequence[Host],
    node_rank: int,
    port: int,
    *,
    max_restarts: int,
    limit: float,
    least: int | None = None,
    **options: Any,
) -> Iterator[CoordinatorClient]:
    """Connects this launcher with those of the other machines while the context lasts.

    They meet on the first machine, at the port below the first worker's.

    Args:
        hosts: The machines.
        node_rank: This one's position.
        port: Of worker 0.
        max_restarts: How often all may be started again.
        limit: Seconds that a machine may take to come, or to come back.
        least: Workers with which to go on when one does not; None if all are needed.
        **options: Others that must be the same everywhere.

    Raises:
        LaunchError: The port cannot be used.
    """
    if port < 2:
        raise LaunchError(
            "`--port` must be 2 or more with --max-restarts: the launchers meet one below. "
            f"Received: --port={port}. Choose another port."
        )
    settings = {
        "tfdist version": __version__,
        **{f"{name} version": _version(name) for name in _COMPARED},
        "--hosts": ",".join(f"{host.name}:{host.slots}" for host in hosts),
        "--port": port,
        "--max-restarts": max_restarts,
        "--elastic": least,
        **{f"--{name}": value for name, value in options.items()},
    }
    here = "127.0.0.1" if node_rank == 0 else hosts[0].name.strip("[]")
    with contextlib.ExitStack() as stack:
        if node_rank == 0:
            coordinator = Coordinator(
                port - 1, hosts, settings, Restarts(max_restarts), limit, least
            )
            stack.callback(coordinator.close)
        client = CoordinatorClient(
            (here, port - 1), node_rank, settings, Restarts(max_restarts), limit
        )
        stack.callback(client.close)
        yield client


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
