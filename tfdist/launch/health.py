"""Answers probes: whether the launcher lives and whether training goes on. HTTP or a file."""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tfdist.cluster.environment import whole_number
from tfdist.errors import LaunchError
from tfdist.launch.journal import Journal

FILE_EVERY_S = 5.0
"""The file is written anew after this many seconds, as long as the launcher lives."""
_MOST_CALLERS = 64
_CALLER_S = 2.0
_MOST_BYTES = 4096
_TICK_S = 0.5


@contextlib.contextmanager
def health_of(journal: Journal, where: str | None) -> Iterator[None]:
    """Answers probes while the context lasts.

    Args:
        journal: Knows the health of the run.
        where: The value of `--health`: a port, an address `host:port` or a file; or None.

    Raises:
        LaunchError: The port or the file cannot be used.
    """
    if where is None:
        yield
        return
    address = _address(where)
    serve = (
        _file_writer(journal, Path(where)) if address is None else _server(journal, *address)
    )
    is_over = threading.Event()
    thread = threading.Thread(target=serve, args=(is_over,), name="tfdist-health", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join(2 * _TICK_S)


def _address(where: str) -> tuple[str, int] | None:
    """Reads a port or `host:port`; returns None if it is a file."""
    host, _, port_text = where.rpartition(":")
    port = whole_number(port_text)
    if port is None or "/" in where:
        return None
    if not 1 <= port <= 65535 or not re.fullmatch(r"[\w.:\[\]-]*", host):
        raise LaunchError(
            "`--health` must be a port from 1 to 65535, an address or a file. "
            f"Received: --health={where!r}. Write it like 8080, 127.0.0.1:8080 or ./health."
        )
    return host.strip("[]"), port


def _file_writer(journal: Journal, path: Path) -> Callable[[threading.Event], None]:
    part = path.with_name(f".{path.name}.{os.getpid()}")

    def write() -> None:
        part.write_text(json.dumps(journal.report()) + "\n")
        part.replace(path)

    def serve(is_over: threading.Event) -> None:
        while not is_over.wait(FILE_EVERY_S):
            if journal.is_live:  # else the file gets old, which a probe notices
                with contextlib.suppress(OSError):  # a full disk: later again
                    write()
        with contextlib.suppress(OSError):
            path.unlink()

    try:
        write()
    except OSError as error:
        raise LaunchError(
            "`--health` must be a file that can be written, or a port. Received: "
            f"--health={str(path)!r} ({error.strerror}). Choose another one."
        ) from None
    return serve


def _server(journal: Journal, host: str, port: int) -> Callable[[threading.Event], None]:
    try:
        if not host and socket.has_dualstack_ipv6():
            listener = socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True
            )
        else:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise LaunchError(
            "`--health` must be a free port of this machine. Received: "
            f"--health={f'{host}:' if host else ''}{port} ({error.strerror}). Choose another."
        ) from None
    if not host:
        print(
            f"tfdist: --health answers at port {port} of all interfaces: whether the run goes "
            f"on, and at which step. --health 127.0.0.1:{port} answers this machine only.",
            file=sys.stderr,
            flush=True,
        )
    listener.setblocking(False)
    return _ProbeServer(journal, listener).serve


class _ProbeServer:
    """A server for small requests. Nobody can hold it up, or fill its memory.

    Args:
        journal: Knows the health of the run.
        listener: A socket that listens.
    """

    def __init__(self, journal: Journal, listener: socket.socket) -> None:
        self._journal, self._listener = journal, listener
        self._selector = selectors.DefaultSelector()
        self._callers: dict[socket.socket, tuple[float, bytes]] = {}

    def serve(self, is_over: threading.Event) -> None:
        """Answers until the run is over.

        Args:
            is_over: Set when it is.
        """
        with self._listener, self._selector:
            self._selector.register(self._listener, selectors.EVENT_READ)
            while not is_over.is_set():
                for key, _ in self._selector.select(_TICK_S):
                    caller = key.fileobj
                    assert isinstance(caller, socket.socket)
                    if caller is self._listener:
                        self._accept()
                    else:
                        self._read(caller)
                now = time.monotonic()
                for caller, (began, _) in list(self._callers.items()):
                    if now - began > _CALLER_S:
                        self._close(caller)
            for caller in list(self._callers):
                self._close(caller)

    def _accept(self) -> None:
        try:
            caller, _ = self._listener.accept()
        except OSError:  # it has gone, or there are no more file descriptors
            time.sleep(0.01)
            return
        if len(self._callers) >= _MOST_CALLERS:
            self._close(min(self._callers, key=lambda c: self._callers[c][0]))
        caller.setblocking(False)
        self._callers[caller] = time.monotonic(), b""
        self._selector.register(caller, selectors.EVENT_READ)

    def _read(self, caller: socket.socket) -> None:
        began, request = self._callers[caller]
        try:
            data = caller.recv(_MOST_BYTES)
        except OSError:
            data = b""
        request += data
        self._callers[caller] = began, request
        # Closing a connection with unread data would lose the answer.
        is_complete = b"\r\n\r\n" in request or b"\n\n" in request
        if is_complete:
            with contextlib.suppress(OSError):
                caller.send(self._answer(request))
        if not data or is_complete or len(request) > _MOST_BYTES:
            self._close(caller)

    def _close(self, caller: socket.socket) -> None:
        del self._callers[caller]
        self._selector.unregister(caller)
        with contextlib.suppress(OSError):
            caller.shutdown(socket.SHUT_WR)
        caller.close()

    def _answer(self, request: bytes) -> bytes:
        path = [*request.split(b"\n", 1)[0].split(), b"", b""][1]
        journal = self._journal
        answers = {
            b"/": True,
            b"/livez": journal.is_live,
            b"/healthz": journal.is_live,
            b"/readyz": journal.is_ready,
        }
        if path not in answers:
            status, body = "404 Not Found", {"paths": [name.decode() for name in answers]}
        else:
            status = "200 OK" if answers[path] else "503 Service Unavailable"
            body = journal.report()
        content = json.dumps(body).encode() + b"\n"
        head = (
            f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
        )
        return head.encode() + content
