"""Reads the list of hosts in `tfdist run --hosts`, and gives each worker an address."""

from __future__ import annotations

import re
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from tfdist.cluster.environment import whole_number
from tfdist.cluster.rendezvous import START_TIMEOUT, start_timeout
from tfdist.errors import ClusterError

_POLL_S = 0.5


@dataclass(frozen=True)
class Host:
    """A machine and how many workers run on it.

    Attributes:
        name: Its host name or IP address, as the other machines reach it.
        slots: How many workers run on it.
    """

    name: str
    slots: int = 1


def parse_hosts(text: str) -> tuple[Host, ...]:
    """Reads a list of hosts.

    Args:
        text: Hosts separated by commas, each `host` or `host:slots`; 1 slot by default.

    Returns:
        The hosts in their order; a host's position is its node rank.

    Raises:
        ClusterError: A name is empty or comes twice, or slots are not a positive number.

    Example:
        >>> parse_hosts("node1:2,node2")
        (Host(name='node1', slots=2), Host(name='node2', slots=1))
    """
    hosts: list[Host] = []
    for entry in text.split(","):
        match = re.fullmatch(r"(\[[^\]]*\]|[^:\[\]]*)(?::(.*))?", entry.strip())
        if match is None or not match[1].strip("[] "):
            raise ClusterError(
                "`--hosts` must name a host in each of its entries 'host' or 'host:slots'. "
                f"Received: --hosts={text!r}, in which {entry!r} names none. "
                "Write it like node1:2,node2:2 (an IPv6 address in brackets: [::1]:2)."
            )
        name, slots_text = match[1], match[2] if match[2] is not None else "1"
        slots = whole_number(slots_text)
        if not slots:
            raise ClusterError(
                "`--hosts` must give each host 1 or more slots, the number of its workers. "
                f"Received: --hosts={text!r}, in which {entry!r} has {slots_text!r} slots. "
                "Write it like node1:2,node2:2; the port is given by --port."
            )
        if any(name == host.name for host in hosts):
            raise ClusterError(
                "`--hosts` must name each host once. "
                f"Received: --hosts={text!r}, in which {name!r} is given twice. "
                f"Give it more slots instead, such as {name}:2."
            )
        hosts.append(Host(name, slots))
    return tuple(hosts)


def check_names(hosts: Sequence[Host]) -> None:
    """Waits until the names of all hosts resolve, for at most `TFDIST_START_TIMEOUT` seconds.

    The name of a pod resolves only once the pod exists.

    Args:
        hosts: The hosts.

    Raises:
        ClusterError: One or more names do not resolve in time.
    """
    began, is_told = time.monotonic(), False
    while unknown := [host.name for host in hosts if not _resolves(host.name)]:
        limit, listed = start_timeout(), ", ".join(unknown)
        if time.monotonic() - began >= limit:
            raise ClusterError(
                "`--hosts` must name machines whose addresses can be found from here. "
                f"Received: {listed}, which no name service knows after {limit} s "
                f"({START_TIMEOUT}). Correct the name, or give the IP address."
            )
        if not is_told:
            is_told = True
            print(
                f"tfdist: no name service knows {listed} yet. This launcher waits up to "
                f"{limit} s ({START_TIMEOUT}).",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(_POLL_S)


def _resolves(name: str) -> bool:
    try:
        return bool(socket.getaddrinfo(name.strip("[]"), None))
    except OSError:
        return False


def worker_addresses(hosts: Sequence[Host], port: int) -> tuple[str, ...]:
    """Gives every worker on every host an address.

    Ports are counted over all workers, not for each host anew. So two names of one machine,
    such as localhost and 127.0.0.1, never get the same port.

    Args:
        hosts: The hosts, in order of their node rank.
        port: The port of worker 0; worker k has `port + k`.

    Returns:
        The addresses, worker 0's first.

    Raises:
        ClusterError: The last worker's port would be above 65535.

    Example:
        >>> worker_addresses(parse_hosts("a:2,b"), 17380)
        ('a:17380', 'a:17381', 'b:17382')
    """
    total = sum(host.slots for host in hosts)
    if not 1 <= port <= 65536 - total:
        raise ClusterError(
            f"`--port` must be from 1 to {65536 - total}, so that each of {total} "
            f"workers has a port. Received: --port={port}. Choose another port."
        )
    names = [host.name for host in hosts for _ in range(host.slots)]
    return tuple(f"{name}:{port + index}" for index, name in enumerate(names))
