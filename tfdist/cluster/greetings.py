"""What workers say to each other before TensorFlow connects them, and how it is received."""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple

from tfdist.cluster import Cluster, strict_json
from tfdist.cluster.listening import bound_everywhere, bound_to
from tfdist.errors import StrategyError

_MOST_BYTES = 1 << 20
_MOST_CALLERS = 256
_POLL_S = 0.1
# A greeting is one packet or a few: a caller that takes longer is not a worker.
_GREETING_S = 5.0
_MOST_TEXT = 1 << 10


class Greeting(NamedTuple):
    """What a worker sends to another worker about itself.

    Attributes:
        worker: Its position.
        addresses: The addresses of all workers, as it knows them.
        versions: Its versions of packages.
    """

    worker: int
    addresses: Sequence[str]
    versions: str

    def line(self) -> bytes:
        """Returns the greeting as it is sent."""
        return json.dumps(self).encode() + b"\n"

    @classmethod
    def read(cls, line: bytes, workers: int) -> Greeting | None:
        """Reads a greeting.

        Args:
            line: The line that was received.
            workers: How many workers there are.

        Returns:
            The greeting, or None if no worker can have sent it.
        """
        try:
            worker, addresses, versions = strict_json.loads(line, _MOST_BYTES)
        except (ValueError, TypeError):
            return None
        is_list = isinstance(addresses, list) and len(addresses) <= max(1024, 2 * workers)
        if type(worker) is not int or not 0 <= worker < max(1024, 2 * workers) or not is_list:
            return None
        texts = [*addresses, versions]
        if not all(isinstance(text, str) and len(text) <= _MOST_TEXT for text in texts):
            return None
        return cls(worker, tuple(addresses), versions)


@dataclass(eq=False)
class _Caller:
    connection: socket.socket
    content: bytes = b""
    since: float = field(default_factory=time.monotonic)


class Greetings:
    """Listens at the address of this worker, and receives greetings from many at a time.

    No caller is waited for: one that sends slowly or nothing is cut off after some seconds.

    Args:
        cluster: The cluster, with this process's place.
        address: This worker's address, `host:port`.

    Raises:
        StrategyError: The port is in use.
    """

    def __init__(self, cluster: Cluster, address: str) -> None:
        self._workers = cluster.num_workers
        self._callers: list[_Caller] = []
        host, _, port_text = address.rpartition(":")
        host, port = host.strip("[]"), int(port_text)
        is_loopback = host in ("localhost", "::1") or host.startswith("127.")
        try:
            # A pod's name may belong to a service in front of it: it cannot be bound.
            self._listener = (
                bound_to("127.0.0.1" if host == "localhost" else host, port)
                if is_loopback
                else bound_everywhere(port)
            )
        except OSError as error:
            raise StrategyError(
                f"The port of this worker must be free. Received: {cluster.task} at {address}, "
                f"but port {port}: {error.strerror}. Stop what uses it, or choose another."
            ) from error
        self._listener.listen(max(128, cluster.num_workers))
        self._listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)

    def __enter__(self) -> Greetings:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for caller in tuple(self._callers):
            self._drop(caller)
        self._listener.close()
        self._selector.close()

    def received(self) -> Iterator[Greeting]:
        """Waits a moment, and yields the greetings that have come."""
        for key, _ in self._selector.select(_POLL_S):
            if key.fileobj is self._listener:
                self._accept()
            elif key.data in self._callers:
                greeting = self._read(key.data)
                if greeting is not None:
                    yield greeting
        now = time.monotonic()
        for caller in tuple(self._callers):
            if now - caller.since > _GREETING_S:
                self._drop(caller)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            if self._callers:  # there may be no descriptors left: give one back
                self._drop(self._callers[0])
            else:
                time.sleep(_POLL_S)
            return
        connection.setblocking(False)
        if len(self._callers) >= max(_MOST_CALLERS, 2 * self._workers):
            self._drop(self._callers[0])
        caller = _Caller(connection)
        self._callers.append(caller)
        self._selector.register(connection, selectors.EVENT_READ, caller)

    def _read(self, caller: _Caller) -> Greeting | None:
        try:
            data = caller.connection.recv(1 << 16)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError:
            data = b""
        caller.content += data
        line, end, _ = caller.content.partition(b"\n")
        if end or not data or len(caller.content) > _MOST_BYTES:
            self._drop(caller)
        return Greeting.read(line, self._workers) if end else None

    def _drop(self, caller: _Caller) -> None:
        self._callers.remove(caller)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(caller.connection)
        caller.connection.close()
