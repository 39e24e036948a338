"""Launches Horovod's ranks: their environment variables, and their rendezvous server."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from tfdist.errors import LaunchError
from tfdist.launch.hosts import Host

_HOST, _PORT = "HOROVOD_GLOO_RENDEZVOUS_ADDR", "HOROVOD_GLOO_RENDEZVOUS_PORT"


def rank_environments(
    hosts: Sequence[Host], node_rank: int, address: str
) -> tuple[dict[str, str], ...]:
    """Returns the environment variables that Horovod reads, for each rank.

    Args:
        hosts: The machines, in order of their node rank.
        node_rank: This machine's position in `hosts`.
        address: "host:port" of the rendezvous server, on the first host.

    Returns:
        The variables of all ranks. Only this machine's ranks have the right network interface.

    Raises:
        LaunchError: Horovod is not installed, or an interface cannot be found.
    """
    host, _, port = address.rpartition(":")
    # On the first host, its own name may resolve to a loopback address only.
    towards = hosts[1].name if node_rank == 0 and len(hosts) > 1 else host
    shared = {
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        "HOROVOD_GLOO_IFACE": _interface_towards(towards),
        _HOST: _resolved(host),
        _PORT: port,
    }
    return tuple(
        {
            **shared,
            "HOROVOD_HOSTNAME": slot.hostname,
            "HOROVOD_RANK": str(slot.rank),
            "HOROVOD_SIZE": str(slot.size),
            "HOROVOD_LOCAL_RANK": str(slot.local_rank),
            "HOROVOD_LOCAL_SIZE": str(slot.local_size),
            "HOROVOD_CROSS_RANK": str(slot.cross_rank),
            "HOROVOD_CROSS_SIZE": str(slot.cross_size),
        }
        for slot in _slots(hosts)
    )


@contextmanager
def rendezvous(first: Mapping[str, str], hosts: Sequence[Host]) -> Iterator[None]:
    """Runs the rendezvous server if this machine starts rank 0.

    Args:
        first: The variables of the first rank that this machine starts.
        hosts: The machines; empty if there is only this one.

    Raises:
        LaunchError: The port is in use.
    """
    if first["HOROVOD_RANK"] != "0":
        yield
        return
    from horovod.runner.http.http_server import RendezvousHTTPServer

    port = int(first[_PORT])
    try:
        interface = "" if len(hosts) > 1 else first[_HOST]
        server = RendezvousHTTPServer((interface, port), _handler(), verbose=0)
    except OSError as error:
        raise LaunchError(
            "The port at which Horovod's ranks meet must be free on the first host. Received: "
            f"port {port} ({error.strerror}). Choose another --port, the same on every host."
        ) from None
    server.init(_slots(hosts or one_host(int(first["HOROVOD_SIZE"]))))
    thread = threading.Thread(
        target=server.serve_forever, name="tfdist-rendezvous", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


def _handler() -> type:
    """Returns the class that answers a rank's requests at the server."""
    from horovod.runner.http.http_server import RendezvousHandler

    class Handler(RendezvousHandler):  # type: ignore[misc]
        """Forgets the addresses of a scope when all its ranks have finished there.

        Horovod's own handler then forgets the finished ranks of all other scopes too, and so
        never clears those scopes. Ranks that connect again, in process sets, may then find
        outdated addresses.
        """

        def do_DELETE(self) -> None:  # noqa: N802, the name that the server calls
            scope, _, key = self.path.lstrip("/").partition("/")
            size = self.server.scope_size.get(scope)
            if size is None or not key:
                super().do_DELETE()
                return
            with self.server.finished_list_lock, self.server.cache_lock:
                finished_ranks = self.server.finished_list[scope]
                finished_ranks.append(key)
                if len(finished_ranks) == size:
                    finished_ranks.clear()
                    self.server.cache.get(scope, {}).clear()
            self.send_status_code(200)

    return Handler


def one_host(slots: int) -> tuple[Host, ...]:
    """Returns a list of hosts with only this machine.

    Args:
        slots: How many ranks run on it.
    """
    return (Host("127.0.0.1", slots),)


def _slots(hosts: Sequence[Host]) -> list[Any]:
    if find_spec("horovod") is None:
        raise LaunchError(
            "Horovod must be installed for --strategy horovod. Received: no package of that "
            "name in this environment. Run `tfdist horovod build`."
        )
    from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts

    listed = ",".join(f"{host.name}:{host.slots}" for host in hosts)
    total = sum(host.slots for host in hosts)
    slots: list[Any] = get_host_assignments(parse_hosts(listed), total)
    return slots


def _resolved(host: str) -> str:
    try:
        return socket.gethostbyname(host)
    except OSError as error:
        raise LaunchError(
            f"Each of --hosts must be a name that this machine knows. Received: {host!r} "
            f"({error.strerror}). Correct --hosts."
        ) from None


def _interface_towards(host: str) -> str:
    """Finds the network interface by which this machine reaches a host."""
    import psutil

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((_resolved(host), 9))  # sends nothing
        except OSError as error:
            raise LaunchError(
                f"The hosts must be able to reach each other. Received: {host!r} "
                f"({error.strerror}). Correct --hosts."
            ) from None
        own_address = probe.getsockname()[0]
    for interface, addresses in psutil.net_if_addrs().items():
        if any(address.address == own_address for address in addresses):
            return str(interface)
    raise LaunchError(f"No network interface has this machine's address {own_address}.")
