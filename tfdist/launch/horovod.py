"""Launches Horovod's ranks: the environment variables by which they find each other."""

from __future__ import annotations

import ipaddress
import secrets
import socket
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from tfdist.errors import LaunchError
from tfdist.launch.hosts import Host
from tfdist.launch.token import TOKEN, derived

ADDRESS = "HOROVOD_GLOO_RENDEZVOUS_ADDR"
"""Environment variable: the address of the server at which the ranks meet.

Horovod makes URLs of it, `http://ADDRESS:PORT/scope/key`, and splits those again. So the secret
of the run can come with it: `10.0.0.1:17380/secret` is read as that address and port, and a
path that begins with the secret. Horovod has no other place for one.
"""

PORT = "HOROVOD_GLOO_RENDEZVOUS_PORT"


def secret_for(environ: Mapping[str, str], is_alone: bool) -> str:
    """Returns the secret that the rendezvous server asks for.

    Args:
        environ: The environment variables.
        is_alone: Whether this launcher starts all ranks.

    Returns:
        The secret; empty if the launchers have no token.
    """
    if is_alone:
        return secrets.token_hex(16)
    token = environ.get(TOKEN, "")
    return derived(token, "rendezvous of Horovod")[:32] if token else ""


def rank_environments(
    hosts: Sequence[Host], node_rank: int, address: str, secret: str = ""
) -> tuple[dict[str, str], ...]:
    """Returns the environment variables that Horovod reads, for each rank.

    Args:
        hosts: The machines, in order of their node rank.
        node_rank: This machine's position in `hosts`.
        address: "host:port" of the rendezvous server, on the first host.
        secret: The secret that the server asks for; empty if it asks for none.

    Returns:
        The variables of all ranks. Only this machine's ranks have the right network interface.

    Raises:
        LaunchError: Horovod is not installed, or an interface cannot be found.
    """
    host, _, port = address.rpartition(":")
    server = _resolved(host)
    # On the first host, its own name may resolve to a loopback address only.
    is_first = node_rank == 0 and len(hosts) > 1
    own_address = _own_address_towards(hosts[1].name if is_first else host)
    if is_first and not _is_usable(server, own_address):
        server = own_address
    shared = {
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        "HOROVOD_GLOO_IFACE": _interface_of(own_address),
        ADDRESS: f"{server}:{port}/{secret}" if secret else server,
        PORT: port,
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
        for slot in slots_of(hosts)
    )


def one_host(slots: int) -> tuple[Host, ...]:
    """Returns a list of hosts with only this machine.

    Args:
        slots: How many ranks run on it.
    """
    return (Host("127.0.0.1", slots),)


def slots_of(hosts: Sequence[Host]) -> list[Any]:
    """Returns Horovod's assignment of ranks to hosts.

    Args:
        hosts: The machines, in order of their node rank.

    Raises:
        LaunchError: Horovod is not installed.
    """
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
    """Returns the IPv4 address of a host: Horovod knows no other."""
    name = host.strip("[]")
    try:
        return str(socket.getaddrinfo(name, None, socket.AF_INET)[0][4][0])
    except OSError as error:
        is_of_ipv6 = _has_ipv6(name)
        raise LaunchError(
            "Each of --hosts must have an address of IPv4 with --strategy horovod: Horovod "
            f"knows no IPv6. Received: {host!r}. Give IPv4 addresses, or use --strategy "
            "multi_worker."
            if is_of_ipv6
            else f"Each of --hosts must be a name that this machine knows. Received: {host!r} "
            f"({error.strerror}). Correct --hosts."
        ) from None


def _has_ipv6(name: str) -> bool:
    try:
        return bool(socket.getaddrinfo(name, None, socket.AF_INET6))
    except OSError:
        return False


def _is_usable(server: str, own_address: str) -> bool:
    """Tells whether the first host can listen at an address so that the others reach it."""
    if ipaddress.ip_address(server).is_loopback:
        return ipaddress.ip_address(own_address).is_loopback
    with socket.socket() as probe:
        try:
            probe.bind((server, 0))
        except OSError:  # of a service in front of this machine
            return False
    return True


def _own_address_towards(host: str) -> str:
    """Finds the address from which this machine reaches a host."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((_resolved(host), 9))  # sends nothing
        except OSError as error:
            raise LaunchError(
                f"The hosts must be able to reach each other. Received: {host!r} "
                f"({error.strerror}). Correct --hosts."
            ) from None
        return str(probe.getsockname()[0])


def _interface_of(own_address: str) -> str:
    """Finds the network interface that has an address of this machine."""
    import psutil

    for interface, addresses in psutil.net_if_addrs().items():
        if any(address.address == own_address for address in addresses):
            return str(interface)
    raise LaunchError(f"No network interface has this machine's address {own_address}.")
