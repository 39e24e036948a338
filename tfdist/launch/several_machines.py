"""Connects the launchers of several machines: the settings they compare, their coordinator."""

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
from tfdist.launch.restarts import RestartLimit, Restarts

_COMPARED = ("tensorflow", "keras", "horovod")

NODE_TIMEOUT_S = 600.0
"""Seconds that a machine may take to come, or to come back."""


@contextlib.contextmanager
def connect_launchers(
    hosts: Sequence[Host],
    node_rank: int,
    port: int,
    token: str,
    *,
    max_restarts: int | RestartLimit,
    limit: float,
    min_workers: int | None = None,
    **options: Any,
) -> Iterator[CoordinatorClient]:
    """Connects this launcher with those of the other machines while the context lasts.

    The coordinator runs on the first machine, at the port below the first worker's port.

    Args:
        hosts: The machines.
        node_rank: The position of this machine.
        port: The port of worker 0.
        token: The secret that all launchers of the run share.
        max_restarts: How often all workers may be started again.
        limit: Seconds that a machine may take to come, or to come back.
        min_workers: The least workers that start without a missing machine; None if all
            machines are needed.
        **options: Other options that must be the same everywhere.

    Raises:
        LaunchError: The port cannot be used.
    """
    if port < 2:
        raise LaunchError(
            "`--port` must be 2 or more with --max-restarts: the launchers meet one below. "
            f"Received: --port={port}. Choose another port."
        )
    restart_limit = Restarts(max_restarts).limit
    settings = {
        "tfdist version": __version__,
        **{f"{name} version": _version(name) for name in _COMPARED},
        "--hosts": ",".join(f"{host.name}:{host.slots}" for host in hosts),
        "--port": port,
        "--max-restarts": restart_limit.setting,
        "--elastic": min_workers,
        **{f"--{name}": value for name, value in options.items()},
    }
    coordinator_host = "127.0.0.1" if node_rank == 0 else hosts[0].name.strip("[]")
    with contextlib.ExitStack() as stack:
        if node_rank == 0:
            coordinator = Coordinator(
                port - 1, token, hosts, settings, Restarts(restart_limit), limit, min_workers
            )
            stack.callback(coordinator.close)
        client = CoordinatorClient(
            (coordinator_host, port - 1),
            token,
            node_rank,
            settings,
            Restarts(restart_limit),
            limit,
        )
        stack.callback(client.close)
        yield client


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
