"""Measures the link between two hosts over TCP: its latency, and its rate in each direction."""

from __future__ import annotations

import contextlib
import socket
import statistics
import struct
import time
from dataclasses import dataclass

from tfdist.cluster.listening import bound_everywhere
from tfdist.launch.self_test.peers import Peers

_PINGS = 20
_CHUNK = bytes(1 << 16)
# A transfer is repeated, each time larger, until it takes this long or has this many bytes.
_LONG_ENOUGH_S = 0.4
_MOST_BYTES = 1 << 26
_IO_S = 20.0
_RETRY_S = 0.2
_CONNECT_S = 30.0
# A request: what to do, and a number of bytes.
_REQUEST = struct.Struct("!cQ")
_PING, _DOWNLOAD, _UPLOAD, _END = b"P", b"D", b"U", b"E"


@dataclass(frozen=True)
class HostLink:
    """The link between the first host and another one.

    Attributes:
        source: The first host.
        target: The other host.
        latency_s: Seconds for a byte there and back.
        to_bytes_per_s: Bytes a second from the first host to the other.
        from_bytes_per_s: Bytes a second in the other direction.
    """

    source: str
    target: str
    latency_s: float
    to_bytes_per_s: float
    from_bytes_per_s: float

    @property
    def bytes_per_s(self) -> float:
        """The rate of the slower direction."""
        return min(self.to_bytes_per_s, self.from_bytes_per_s)


def links(peers: Peers) -> tuple[list[HostLink], list[str]]:
    """Measures the link between the first host and each other one, one after the other.

    Each launcher calls this at the same time, after all have reached each other. The port of
    the first process on a host is used.

    Args:
        peers: The processes of the run.

    Returns:
        On the first host the links, and the hosts whose link could not be measured; elsewhere
        nothing.
    """
    first, *others = peers.heads
    if first in peers.here:
        source, measured, failed = peers.tasks[first].host, [], []
        for head in others:
            task = peers.tasks[head]
            try:
                measured.append(measure(source, task.host, task.port))
            except OSError:
                failed.append(task.host)
        return measured, failed
    for number, head in enumerate(others):
        if head in peers.here:
            # Those before take their time.
            serve(peers.tasks[head].port, _CONNECT_S * (number + 1))
    return [], []


def serve(port: int, seconds: float) -> bool:
    """Answers one measurement.

    Args:
        port: The port to listen on.
        seconds: How long to wait for it.

    Returns:
        Whether it came to its end.
    """
    deadline = time.monotonic() + seconds
    with contextlib.suppress(OSError), bound_everywhere(port) as listener:
        listener.listen(16)
        while (left := deadline - time.monotonic()) > 0:
            listener.settimeout(left)
            connection, _ = listener.accept()
            with contextlib.suppress(OSError, ValueError), connection:
                _tune(connection)
                while _answer(connection):
                    pass
                return True
    return False


def measure(source: str, target: str, port: int) -> HostLink:
    """Measures the link to a host at which `serve` listens.

    Args:
        source: The name of this host.
        target: The name of the other one.
        port: The port there.

    Raises:
        OSError: The host does not answer in time.
    """
    with _connected(target, port) as connection:
        pings = sorted(_ping(connection) for _ in range(_PINGS))
        latency = statistics.median(pings)
        to, back = _rate(connection, _UPLOAD, latency), _rate(connection, _DOWNLOAD, latency)
        connection.sendall(_REQUEST.pack(_END, 0))
    return HostLink(source, target, latency, to, back)


def _connected(target: str, port: int) -> socket.socket:
    """Connects to `serve`, which may begin a little later, and makes sure that it answers."""
    deadline = time.monotonic() + _CONNECT_S
    while True:
        try:
            connection = socket.create_connection((target.strip("[]"), port), timeout=2.0)
            try:
                _tune(connection)
                _ping(connection)
            except OSError:
                connection.close()
                raise
            return connection
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_RETRY_S)


def _tune(connection: socket.socket) -> None:
    connection.settimeout(_IO_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _ping(connection: socket.socket) -> float:
    began = time.perf_counter()
    connection.sendall(_REQUEST.pack(_PING, 1))
    _take(connection, 1)
    return time.perf_counter() - began


def _rate(connection: socket.socket, kind: bytes, latency: float) -> float:
    size = len(_CHUNK)
    while True:
        began = time.perf_counter()
        connection.sendall(_REQUEST.pack(kind, size))
        if kind == _UPLOAD:
            _give(connection, size)
            _take(connection, 1)
        else:
            _take(connection, size)
        seconds = max(time.perf_counter() - began - latency, 1e-9)
        if seconds >= _LONG_ENOUGH_S or size >= _MOST_BYTES:
            return size / seconds
        size *= 4


def _answer(connection: socket.socket) -> bool:
    """Answers a request; tells whether there may be another one."""
    kind, size = _REQUEST.unpack(_take(connection, _REQUEST.size))
    if size > _MOST_BYTES:
        raise ValueError("not a request")
    if kind == _DOWNLOAD:
        _give(connection, size)
    elif kind in (_UPLOAD, _PING):
        if kind == _UPLOAD:
            _take(connection, size)
        connection.sendall(b"A")
    elif kind != _END:
        raise ValueError("not a request")
    return bool(kind != _END)


def _give(connection: socket.socket, size: int) -> None:
    for start in range(0, size, len(_CHUNK)):
        connection.sendall(_CHUNK[: size - start])


def _take(connection: socket.socket, size: int) -> bytes:
    """Receives a number of bytes, and returns the last piece of them."""
    piece = b""
    while size > 0:
        received = connection.recv(min(size, 1 << 20))
        if not received:
            raise ConnectionError("the other side has closed the connection")
        piece, size = (piece + received)[-_REQUEST.size :], size - len(received)
    return piece
