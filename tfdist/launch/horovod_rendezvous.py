"""The server at which Horovod's ranks meet, and which keeps their texts while they train.

It is Horovod's own, with limits: it serves those who know the secret of the run, a few requests
at a time, each for some seconds, and keeps so many bytes and no more.
"""

from __future__ import annotations

import contextlib
import hmac
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from tfdist.errors import LaunchError
from tfdist.launch.horovod import ADDRESS, PORT, one_host, slots_of
from tfdist.launch.hosts import Host

MOST_BYTES = 1 << 20
"""The largest value: of 7000 ranks, each sends the addresses that it has for the others."""

_MOST_BYTES_IN_ALL = 1 << 28
_MOST_REQUESTS = 256
_REQUEST_S = 10.0
_PART = re.compile(r"[^/\s]{1,200}")


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
    address, port = first[ADDRESS].partition(":")[0], int(first[PORT])
    secret = first[ADDRESS].partition("/")[2]
    try:
        server = _server_class()(
            (address, port), _handler_class(f"{secret}:{port}" if secret else ""), verbose=0
        )
    except OSError as error:
        raise LaunchError(
            "The port at which Horovod's ranks meet must be free on the first host. Received: "
            f"port {port} of {address} ({error.strerror}). Choose another --port, the same on "
            "every host."
        ) from None
    server.init(slots_of(hosts or one_host(int(first["HOROVOD_SIZE"]))))
    thread = threading.Thread(
        target=server.serve_forever, name="tfdist-rendezvous", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


def _server_class() -> type:
    """Returns the class of the server."""
    from horovod.runner.http.http_server import RendezvousHTTPServer

    class Server(RendezvousHTTPServer):  # type: ignore[misc]
        """Answers a few requests at a time, and cuts off those that take long."""

        daemon_threads = True
        block_on_close = False
        request_queue_size = 128

        def __init__(self, *arguments: Any, **options: Any) -> None:
            self._begun: dict[socket.socket, float] = {}
            super().__init__(*arguments, **options)

        def process_request(self, request: socket.socket, client_address: Any) -> None:
            if len(self._begun) >= _MOST_REQUESTS:
                self.shutdown_request(request)
                return
            self._begun[request] = time.monotonic()
            try:
                super().process_request(request, client_address)
            except RuntimeError:  # no more threads
                self.shutdown_request(request)

        def shutdown_request(self, request: socket.socket) -> None:
            self._begun.pop(request, None)
            super().shutdown_request(request)

        def service_actions(self) -> None:
            """Runs twice a second between requests."""
            now = time.monotonic()
            for request, begun in tuple(self._begun.items()):
                if now - begun > _REQUEST_S:
                    with contextlib.suppress(OSError):
                        request.shutdown(socket.SHUT_RDWR)  # its thread closes it

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Says nothing: whoever sends nonsense need not fill the output of the run."""

    return Server


def _handler_class(secret: str) -> type:
    """Returns the class that answers requests.

    Args:
        secret: The first part of the path of each request; empty if there is none.
    """
    from horovod.runner.http.http_server import RendezvousHandler

    class Handler(RendezvousHandler):  # type: ignore[misc]
        """Checks a request before Horovod's own handler gets it.

        It also forgets the addresses of a scope when all its ranks have finished there.
        Horovod's own handler then forgets the finished ranks of all other scopes too, and so
        never clears those scopes. Ranks that connect again, in process sets, may then find
        outdated addresses.
        """

        path: str

        def parse_request(self) -> bool:
            """Reads the head of a request, and answers one that is not to be served."""
            if not super().parse_request():
                return False
            status, self.path = _checked(self, secret)
            if status:
                self.send_status_code(status)
            return not status

        def _put_value(self, scope: str, key: str, value: bytes) -> None:
            is_whole = len(value) == int(self.headers["Content-Length"])
            if is_whole and _bytes_stored(self.server) + len(value) <= _MOST_BYTES_IN_ALL:
                super()._put_value(scope, key, value)

        def do_DELETE(self) -> None:  # noqa: N802, the name that the server calls
            scope, _, key = self.path.lstrip("/").partition("/")
            size = self.server.scope_size.get(scope)
            if size is None or not key:
                super().do_DELETE()
                return
            with self.server.finished_list_lock, self.server.cache_lock:
                finished_ranks = self.server.finished_list[scope]
                finished_ranks.append(key)
                if len(finished_ranks) >= size:
                    finished_ranks.clear()
                    self.server.cache.get(scope, {}).clear()
            self.send_status_code(200)

    return Handler


def _checked(request: Any, secret: str) -> tuple[int, str]:
    """Decides whether a request is served.

    Args:
        request: Horovod's handler, which has read the head of the request.
        secret: The first part of the path of each request; empty if there is none.

    Returns:
        A status of HTTP, or 0 to go on, and the path without the secret.
    """
    parts = request.path.encode("utf-8", "replace").decode().split("/")[1:]
    if secret:
        given = parts.pop(0) if parts else ""
        if not hmac.compare_digest(given.encode(), secret.encode()):
            return 403, request.path
    if request.command not in ("GET", "PUT", "DELETE"):
        return 405, request.path
    if len(parts) != 2 or not all(map(_PART.fullmatch, parts)):
        return 400, request.path
    path = "/" + "/".join(parts)
    length = request.headers.get("Content-Length", "")
    if request.command == "PUT":
        if not (length.isascii() and length.isdigit() and len(length) < 10):
            return 411, path
        if int(length) > MOST_BYTES:
            return 413, path
    return 0, path


def _bytes_stored(server: Any) -> int:
    """Counts the bytes of all texts that Horovod's server keeps."""
    with server.cache_lock:
        return sum(len(text) for texts in server.cache.values() for text in texts.values())
