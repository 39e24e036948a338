"""Waits until every worker of a cluster is up, and names the workers that are missing.

TensorFlow's own wait holds Python's interpreter lock: meanwhile nothing can be printed or
interrupted. It does not name the missing workers either.
"""

from __future__ import annotations

import math
import socket
import sys
import time
from collections.abc import Mapping, Sequence

from tfdist.cluster import Cluster
from tfdist.cluster.environment import limit_of
from tfdist.cluster.greetings import Greeting, Greetings
from tfdist.errors import StrategyError

START_TIMEOUT = "TFDIST_START_TIMEOUT"
"""Environment variable: seconds to wait for the other workers to come up, default 300."""


_POLL_S = 0.2
# After this many seconds a message names the missing workers.
_NOTICE_S = 10.0
# After it has found a mistake, a worker greets the other workers for this many seconds more.
_PARTING_S = 5.0


def start_timeout() -> int:
    """Returns the seconds to wait for the other workers to come up.

    Raises:
        ClusterError: The environment variable is not a number.
    """
    return math.ceil(limit_of(START_TIMEOUT, 300))


def wait_until_up(addresses: Mapping[str, str], seconds: float) -> None:
    """Returns when something listens at every address.

    Args:
        addresses: `host:port` by the name of the task.
        seconds: The limit.

    Raises:
        StrategyError: A task did not come up in time; the message names it.
    """
    wait = _Wait("this process", seconds)
    missing = dict(addresses)
    while missing:
        reasons = {task: try_to_connect(address) for task, address in missing.items()}
        missing = {task: missing[task] for task, reason in reasons.items() if reason}
        wait.check([f"{task} at {a} ({reasons[task]})" for task, a in missing.items()])
        if missing:
            time.sleep(_POLL_S)


def wait_until_resolved(names: Sequence[str], seconds: float) -> None:
    """Returns when every name resolves to an address.

    Args:
        names: The names of machines.
        seconds: The limit.

    Raises:
        StrategyError: A name does not resolve in time.
    """
    wait = _Wait("this process", seconds)
    while missing := [
        f"{name} (its name does not resolve)" for name in names if not _resolves(name)
    ]:
        wait.check(missing)
        time.sleep(_POLL_S)


def _resolves(name: str) -> bool:
    try:
        return bool(socket.getaddrinfo(name, None))
    except OSError:
        return False


def is_up(address: str) -> bool:
    """Returns whether something listens at an address.

    Args:
        address: `host:port`.
    """
    return try_to_connect(address) is None


def answers(address: str, seconds: float) -> bool:
    """Returns whether the TensorFlow server at an address answers.

    A connection alone proves nothing: the system accepts connections for a stopped process
    too. A server that runs sends the first bytes, the settings of HTTP/2.

    Args:
        address: `host:port`.
        seconds: How long it may take.
    """
    try:
        with socket.create_connection(_split(address), timeout=seconds) as connection:
            return bool(connection.recv(1))
    except OSError:
        return False


def meet(cluster: Cluster, seconds: float, versions: str = "") -> None:
    """Returns when this worker has reached every other worker, and each of them this one.

    Until then each worker listens at its address. Afterwards the port is free for TensorFlow.

    Args:
        cluster: The cluster, with this process's place.
        seconds: The limit.
        versions: The versions of packages that must be the same everywhere, as one text.

    Raises:
        StrategyError: This worker's port is in use, a worker did not come up in time, or
            another worker has other addresses, the same place or other versions.
    """
    addresses = dict(enumerate(cluster.workers))
    local_address = addresses.pop(cluster.worker_index)
    unreached, not_called_back = dict.fromkeys(addresses, "no answer yet"), set(addresses)
    greeting = Greeting(cluster.worker_index, tuple(cluster.workers), versions)
    wait, problem, deadline = _Wait(cluster.task, seconds), "", math.inf
    # Both directions are tried, since a firewall may allow only one of them. TensorFlow would
    # wait without a message.
    with Greetings(cluster, local_address) as greetings:
        while (unreached or not_called_back) and time.monotonic() < deadline:
            for worker in tuple(unreached):
                reason = try_to_connect(addresses[worker], greeting.line())
                if reason is None:
                    del unreached[worker]
                else:
                    unreached[worker] = reason
                if wait.is_over:
                    break
            for received in greetings.received():
                if not problem:
                    problem = difference(received, greeting, cluster)
                    # The other workers need this one's greeting too, to find the same mistake.
                    deadline = time.monotonic() + _PARTING_S if problem else math.inf
                not_called_back.discard(received.worker)
            if problem and not unreached:
                break
            wait.check(
                [
                    f"worker {i} at {addresses[i]} ({unreached.get(i, 'it did not call back')})"
                    for i in sorted(unreached.keys() | not_called_back)
                ]
            )
    if problem:
        raise StrategyError(problem)


class _Wait:
    """A wait for other workers: it names the missing ones, and has a limit."""

    def __init__(self, who: str, seconds: float) -> None:
        self._who = who
        self._seconds = seconds
        self._began = time.monotonic()
        self._has_printed = False

    @property
    def is_over(self) -> bool:
        """Whether the limit is reached."""
        return time.monotonic() - self._began > self._seconds

    def check(self, missing: Sequence[str]) -> None:
        """Prints who is missing after a while, and raises at the limit."""
        waited = time.monotonic() - self._began
        if not missing:
            return
        listed = ", ".join(missing)
        if waited > self._seconds:
            raise StrategyError(
                f"All processes must come up within {self._seconds:g} s ({START_TIMEOUT}). "
                f"Received: no answer from {listed}. See what they print, and check that "
                "their addresses can be reached from here."
            )
        if waited > _NOTICE_S and not self._has_printed:
            self._has_printed = True
            print(
                f"tfdist: {self._who} waits for {listed}, at most {self._seconds:g} s in all "
                f"({START_TIMEOUT}).",
                file=sys.stderr,
                flush=True,
            )


def difference(received: Greeting, local: Greeting, cluster: Cluster) -> str:
    """Returns why a worker cannot train with this one; "" if it can.

    Args:
        received: The other worker's greeting.
        local: The greeting of this one.
        cluster: The cluster, with this process's place.
    """
    if received.worker == local.worker:
        return (
            f"Each worker must have a place of its own. Received: two processes with the place "
            f"of {cluster.task} in {cluster.source}. Give each another task index."
        )
    # A worker's name for itself may differ from the name that other workers use for it.
    local_view, peer_view = list(local.addresses), list(received.addresses)
    for addresses in (local_view, peer_view):
        for worker in (local.worker, received.worker):
            addresses[worker : worker + 1] = [""]
    if local_view != peer_view:
        return (
            "All workers must have the same addresses of all workers. Received: "
            f"{', '.join(local.addresses)} in {cluster.source} of {cluster.task}, "
            f"{', '.join(received.addresses)} in that of worker {received.worker}. Correct one."
        )
    if received.versions != local.versions:
        return (
            f"All workers must have the same versions. Received: {local.versions} on "
            f"{cluster.task}, {received.versions} on worker {received.worker}. "
            "Install the same."
        )
    return ""


def try_to_connect(address: str, greeting: bytes = b"") -> str | None:
    """Connects to an address; returns None, or the reason why nobody answered.

    Args:
        address: `host:port`.
        greeting: What to send there.
    """
    try:
        with socket.create_connection(_split(address), timeout=1.0) as connection:
            connection.sendall(greeting)
            return None
    except socket.gaierror:
        return "its name does not resolve"
    except OSError as error:
        return error.strerror or str(error)


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
