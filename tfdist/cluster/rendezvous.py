"""Waits until every worker of a cluster is up, and says which one is not.

TensorFlow's own wait holds Python's interpreter lock, so nothing can be said or stopped
meanwhile, and it does not name who is missing.
"""

from __future__ import annotations

import contextlib
import json
import math
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from tfdist.cluster import Cluster
from tfdist.cluster.environment import limit_of
from tfdist.errors import StrategyError

START_TIMEOUT = "TFDIST_START_TIMEOUT"
"""Environment variable: seconds to wait for the other workers to come up, default 300."""


_POLL_S = 0.2
_LONGEST = 1 << 20  # bytes of a greeting
# After so many seconds it is said who is waited for.
_NOTICE_S = 10.0
# How long a worker that has found a mistake goes on telling the others of itself.
_PARTING_S = 5.0


def start_timeout() -> int:
    """Returns the seconds to wait for others to come up.

    Raises:
        ClusterError: The environment variable is no number.
    """
    return math.ceil(limit_of(START_TIMEOUT, 300))


def wait_until_up(addresses: Mapping[str, str], seconds: float) -> None:
    """Returns when something listens at every address.

    Args:
        addresses: `host:port` by the name of the task.
        seconds: The limit.

    Raises:
        StrategyError: A task did not come up in time; it is named.
    """
    wait = _Wait("this process", seconds)
    missing = dict(addresses)
    while missing:
        reasons = {task: _knock(address) for task, address in missing.items()}
        missing = {task: missing[task] for task, reason in reasons.items() if reason}
        wait.look([f"{task} at {a} ({reasons[task]})" for task, a in missing.items()])
        if missing:
            time.sleep(_POLL_S)


def wait_until_known(names: Sequence[str], seconds: float) -> None:
    """Returns when a name service knows every name.

    Args:
        names: Of machines.
        seconds: The limit.

    Raises:
        StrategyError: A name is not known in time.
    """
    wait = _Wait("this process", seconds)
    while missing := [
        f"{name} (its name does not resolve)" for name in names if not _knows(name)
    ]:
        wait.look(missing)
        time.sleep(_POLL_S)


def _knows(name: str) -> bool:
    try:
        return bool(socket.getaddrinfo(name, None))
    except OSError:
        return False


def is_up(address: str) -> bool:
    """Tells whether something listens at an address.

    Args:
        address: `host:port`.
    """
    return _knock(address) is None


def answers(address: str, seconds: float) -> bool:
    """Tells whether a TensorFlow server at an address lives, not only its port.

    The system accepts connections for a process that is stopped. A server that is called
    says something first: the settings of HTTP/2.

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
    """Returns when this worker reached every other one, and every other one this.

    Until then each listens at its address; afterwards the port is free for TensorFlow.

    Args:
        cluster: This process's place.
        seconds: The limit.
        versions: Of the packages that must be the same everywhere.

    Raises:
        StrategyError: This worker's port is taken, a worker did not come up in time, or one
            has another cluster, the same place or other versions.
    """
    addresses = dict(enumerate(cluster.workers))
    mine = addresses.pop(cluster.worker_index)
    unreached, unheard = dict.fromkeys(addresses, "no answer yet"), set(addresses)
    greeting = _Greeting(cluster.worker_index, cluster.workers, versions)
    wait, problem, parting = _Wait(cluster.task, seconds), "", math.inf
    with _listening(cluster, mine) as listener:
        while (unreached or unheard) and time.monotonic() < parting:
            for worker in tuple(unreached):
                reason = _knock(addresses[worker], greeting.line())
                if reason is None:
                    del unreached[worker]
                else:
                    unreached[worker] = reason
            heard = _hear(listener)
            if heard is not None and not problem:
                problem = _difference(heard, greeting, cluster)
                # The others are to hear of this one too, and to say the same.
                parting = time.monotonic() + _PARTING_S if problem else math.inf
            if heard is not None:
                unheard.discard(heard.worker)
            if problem and not unreached:
                break
            wait.look(
                [
                    f"worker {i} at {addresses[i]} ({unreached.get(i, 'it did not call back')})"
                    for i in sorted(unreached.keys() | unheard)
                ]
            )
    if problem:
        raise StrategyError(problem)


class _Wait:
    """A wait for others that is spoken of, and has an end."""

    def __init__(self, who: str, seconds: float) -> None:
        self._who = who
        self._seconds = seconds
        self._began = time.monotonic()
        self._is_told = False

    def look(self, missing: Sequence[str]) -> None:
        """Says who is missing, once it takes long, and raises when it takes too long."""
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
        if waited > _NOTICE_S and not self._is_told:
            self._is_told = True
            print(
                f"tfdist: {self._who} waits for {listed}, at most {self._seconds:g} s in all "
                f"({START_TIMEOUT}).",
                file=sys.stderr,
                flush=True,
            )


class _Greeting(NamedTuple):
    """What a worker tells another of itself."""

    worker: int
    addresses: Sequence[str]
    versions: str

    def line(self) -> bytes:
        return json.dumps(self).encode() + b"\n"


def _difference(heard: _Greeting, own: _Greeting, cluster: Cluster) -> str:
    """Says what keeps a worker from training with this one; "" if nothing does."""
    if heard.worker == own.worker:
        return (
            f"Each worker must have a place of its own. Received: two processes with the place "
            f"of {cluster.task} in {cluster.source}. Give each another task index."
        )
    # A worker may know itself by another name than the others do.
    ours, theirs = list(own.addresses), list(heard.addresses)
    for addresses in (ours, theirs):
        for worker in (own.worker, heard.worker):
            addresses[worker : worker + 1] = [""]
    if ours != theirs:
        return (
            "All workers must have the same addresses of all workers. Received: "
            f"{', '.join(own.addresses)} in {cluster.source} of {cluster.task}, "
            f"{', '.join(heard.addresses)} in that of worker {heard.worker}. Correct one."
        )
    if heard.versions != own.versions:
        return (
            f"All workers must have the same versions. Received: {own.versions} on "
            f"{cluster.task}, {heard.versions} on worker {heard.worker}. Install the same."
        )
    return ""


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


def _knock(address: str, greeting: bytes = b"") -> str | None:
    """Calls at an address, and says why nobody answered, or None."""
    try:
        with socket.create_connection(_split(address), timeout=1.0) as connection:
            connection.sendall(greeting)
            return None
    except socket.gaierror:
        return "its name does not resolve"
    except OSError as error:
        return error.strerror or str(error)


def _hear(listener: socket.socket) -> _Greeting | None:
    """Waits a moment for a worker that tells it is up."""
    try:
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as said:
            connection.settimeout(1.0)
            worker, addresses, versions = json.loads(said.readline(_LONGEST))
            return _Greeting(int(worker), tuple(map(str, addresses)), str(versions))
    except (OSError, ValueError, TypeError):  # nobody, or somebody else who knocked
        return None


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
