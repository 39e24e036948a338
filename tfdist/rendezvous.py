"""Waits until every worker of a cluster is up, and says which one is not.

TensorFlow's own wait holds Python's interpreter lock, so nothing can be said or stopped
meanwhile, and it does not name who is missing.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator

from tfdist.cluster import Cluster
from tfdist.errors import StrategyError

START_TIMEOUT = "TFDIST_START_TIMEOUT"
"""Environment variable: seconds to wait for the other workers to come up, default 300."""


def meet(cluster: Cluster, seconds: float) -> None:
    """Returns when every other worker listens at its address.

    Until then this one listens at its own, so that the others can find it; afterwards the
    port is free for TensorFlow.

    Args:
        cluster: This process's place.
        seconds: The limit.

    Raises:
        StrategyError: This worker's port is taken, or a worker did not come up in time.
    """
    workers = dict(enumerate(cluster.workers))
    mine = workers.pop(cluster.worker_index)
    deadline = time.monotonic() + seconds
    with _listening(cluster, mine):
        while workers:
            workers = {i: address for i, address in workers.items() if not _is_up(address)}
            if workers and time.monotonic() > deadline:
                missing = ", ".join(f"{i} at {address}" for i, address in workers.items())
                raise StrategyError(
                    f"All {cluster.num_workers} workers must come up within {seconds:.0f} s "
                    f"({START_TIMEOUT}). Received: no answer from worker {missing}. See what "
                    "they print, and check that their addresses can be reached from here."
                )
            time.sleep(0.1 if workers else 0)


@contextlib.contextmanager
def _listening(cluster: Cluster, address: str) -> Iterator[None]:
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
        yield


def _is_up(address: str) -> bool:
    try:
        with socket.create_connection(_split(address), timeout=1.0):
            return True
    except OSError:
        return False


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
