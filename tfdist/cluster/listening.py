"""Sockets that listen on all interfaces, for IPv4 and, where the system has it, for IPv6."""

from __future__ import annotations

import errno
import socket

_NO_IPV6 = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT, errno.EINVAL)


def bound_everywhere(port: int) -> socket.socket:
    """Returns a socket that is bound to a port of all interfaces, as TensorFlow's servers.

    Args:
        port: The port. One in TIME_WAIT can be used.

    Raises:
        OSError: The port is in use.
    """
    if socket.has_dualstack_ipv6():
        try:
            return _bound(socket.AF_INET6, "::", port)
        except OSError as error:
            if error.errno not in _NO_IPV6:
                raise
    return _bound(socket.AF_INET, "", port)


def bound_to(host: str, port: int) -> socket.socket:
    """Returns a socket that is bound to a port of one address.

    Args:
        host: The address, of IPv4 or IPv6.
        port: The port.

    Raises:
        OSError: The port is in use, or the address is not this machine's.
    """
    return _bound(socket.AF_INET6 if ":" in host else socket.AF_INET, host, port)


def _bound(family: socket.AddressFamily, host: str, port: int) -> socket.socket:
    bound = socket.socket(family)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        bound.bind((host, port))
    except OSError:
        bound.close()
        raise
    return bound
