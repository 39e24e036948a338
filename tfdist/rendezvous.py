"""Waits until every worker of a cluster is up, and says which one is not.

TensorFlow's own wait holds Python's interpreter lock, so nothing can be said or stopped
meanwhile, and it does not name who is missing.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator, Mapping

from tfdist.cluster import Cluster
from tfdist.errors import StrategyError

START_TIMEOUT = "TFDIST_START_TIMEOUT"
"""Environment variable: seconds to wait for the other workers to come up, default 300."""


_POLL_S = 0.2


def start_timeout() -> int:
    """Returns the seconds to wait for others to come up."""
    return int(os.environ.get(START_TIMEOUT, "300"))


def wait_until_up(addresses: Mapping[str, str], seconds: float) -> None:
    """Returns when something listens at every address.

    Args:
        addresses: `host:port` by the name of the task.
        seconds: The limit.

    Raises:
        StrategyError: A task did not come up in time; it is named.
    """
    missing = dict(addresses)
    deadline = time.monotonic() + seconds
    while missing := {task: a for task, a in missing.items() if not is_up(a)}:
        if time.monotonic() > deadline:
            listed = ", ".join(f"{task} at {address}" for task, address in missing.items())
            raise StrategyError(
                f"All processes must come up within {seconds:g} s ({START_TIMEOUT}). "
                f"Received: no answer from {listed}. See what they print, and check that "
                "their addresses can be reached from here."
            )
        time.sleep(_POLL_S)


def is_up(address: str) -> bool:
    """Tells whether something listens at an address.

    Args:
        address: `host:port`.
    """
    try:
        with socket.create_connection(_split(address), timeout=1.0):
            return True
    except OSError:
        return False


def meet(cluster: Cluster, seconds: float) -> None:
    """Returns when this worker reached every other one, and every other one this.

    Until then each listens at its address; afterwards the port is free for TensorFlow.

    Args:
        cluster: This process's place.
        seconds: The limit.

    Raises:
        StrategyError: This worker's port is taken, or a worker did not come up in time.
    """
    addresses = dict(enumerate(cluster.workers))
    mine = addresses.pop(cluster.worker_index)
    unreached, unheard = set(addresses), set(addresses)
    deadline = time.monotonic() + seconds
    with _listening(cluster, mine) as listener:
        while unreached or unheard:
            unreached = {i for i in unreached if not _tell(addresses[i], cluster.worker_index)}
            unheard -= _hear(listener)
            if time.monotonic() > deadline:
                missing = ", ".join(
                    f"{i} at {addresses[i]}" for i in sorted(unreached | unheard)
                )
                raise StrategyError(
                    f"All {cluster.num_workers} workers must come up within {seconds:g} s "
                    f"({START_TIMEOUT}). Received: no answer from worker {missing}. See what "
                    "they print, and check that their addresses can be reached from here."
                )


@contextlib.contextmanager
def _listening(cluster: Cluster, address: str) -> Iterator[socket.socket]:
    host, port = _split(address)
    # A pod's name may belong to a service in front of it: then only "" can be bound.
    interface = host if host == "localhost" or host.startswith("127.") else ""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((interface, port))
        except OSError as error:
            raise StrategyError(
                f"The port of this worker must be free. Received: {cluster.task} at {address}, "
                f"but port {port}: {error.strerror}. Stop what uses it, or choose another."
            ) from error
        listener.listen(cluster.num_workers)
        listener.settimeout(0.1)
        yield listener


def _tell(address: str, worker: int) -> bool:
    """Tells a worker that this one is up, if it listens."""
    try:
        with socket.create_connection(_split(address), timeout=1.0) as connection:
            connection.sendall(b"%d\n" % worker)
            return True
    except OSError:
        return False


def _hear(listener: socket.socket) -> set[int]:
    """Waits a moment for a worker that tells it is up."""
    try:
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as said:
            connection.settimeout(1.0)
            return {int(said.readline(16))}
    except (OSError, ValueError):  # nobody, or somebody else who knocked
        return set()


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
