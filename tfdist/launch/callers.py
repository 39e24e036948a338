"""Who calls the coordinator: launchers that know the token, and strangers, who get nothing."""

from __future__ import annotations

import contextlib
import errno
import hmac
import os
import secrets
import selectors
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from tfdist.cluster.listening import bound_everywhere
from tfdist.errors import LaunchError
from tfdist.launch.messages import PROTOCOL, TO_COORDINATOR, Message
from tfdist.launch.protocol import SILENCE_S, Connection, Handshake

_MOST_STRANGERS = 64
_NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


@dataclass(eq=False)
class Caller:
    """A connection; after its message "join", the launcher of a machine.

    Attributes:
        connection: The connection.
        address: The caller's address.
        nonce: The random text of this connection.
        last_message_at: When its last message came.
        rank: The rank of its machine; None before "join".
        identity: A random text of this launcher.
        is_ready: Whether it has said that it is ready to start.
        is_done: Whether its workers have ended well.
    """

    connection: Connection
    address: str
    nonce: str = field(default_factory=lambda: secrets.token_hex(16))
    last_message_at: float = field(default_factory=time.monotonic)
    rank: int | None = None
    identity: str = ""
    is_ready: bool = False
    is_done: bool = False


class Callers:
    """Accepts callers, and admits those that know the token.

    A caller that has not proved it can do little: it may send one short line, it is cut off
    after some seconds, and there are at most 64 of its kind. It is never waited for.

    Args:
        port: The port to listen on.
        token: The token of the run.

    Attributes:
        all: The callers that are connected.

    Raises:
        LaunchError: The port is in use.
    """

    def __init__(self, port: int, token: str) -> None:
        self.all: list[Caller] = []
        self._token = token.encode()
        try:
            self._listener = bound_everywhere(port)
        except OSError as error:
            raise LaunchError(
                "The port at which the launchers of all hosts meet must be free on the first. "
                f"Received: port {port}, one below --port ({error.strerror}). Choose another "
                "--port, the same on every host."
            ) from None
        self._listener.listen(128)
        self._listener.setblocking(False)
        # Given up when no descriptor is left, so that a caller can be accepted and sent away.
        self._spare: int | None = os.open(os.devnull, os.O_RDONLY)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)

    def messages(self, seconds: float) -> Iterator[tuple[Caller, Message]]:
        """Accepts callers, and yields the messages of those that are admitted.

        Args:
            seconds: How long to wait if nothing happens.
        """
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._listener:
                self._accept()
                continue
            caller: Caller = key.data
            for message in caller.connection.received():
                if caller.connection.is_admitted:
                    caller.last_message_at = time.monotonic()
                    yield caller, message
                else:
                    self._answer(caller, message)

    def drop_lost(self) -> list[Caller]:
        """Drops the callers that are gone or silent, and returns them."""
        now = time.monotonic()
        lost = [
            caller
            for caller in self.all
            if not caller.connection.is_open or now - caller.last_message_at > SILENCE_S
        ]
        for caller in lost:
            self._drop(caller)
        return lost

    def close(self) -> None:
        """Ends all connections."""
        for caller in list(self.all):
            self._drop(caller)
        self._listener.close()
        self._selector.close()
        if self._spare is not None:
            os.close(self._spare)

    def _answer(self, caller: Caller, message: Message) -> None:
        """Admits a caller whose proof is right. Nobody else learns anything."""
        connection = caller.connection
        if message["kind"] == "hello" and message["protocol"] == PROTOCOL:
            handshake = Handshake(self._token, caller.nonce, message["nonce"])
            if hmac.compare_digest(message["proof"], handshake.launcher_proof):
                caller.last_message_at = time.monotonic()
                connection.send("admitted", proof=handshake.coordinator_proof)
                connection.secure(
                    handshake.coordinator_key, handshake.launcher_key, TO_COORDINATOR
                )
                return
        connection.send("denied", protocol=PROTOCOL)
        connection.is_open = False

    def _accept(self) -> None:
        try:
            tcp_socket, address = self._listener.accept()
        except OSError as error:
            if error.errno in _NO_DESCRIPTORS:
                self._send_away()
            return
        strangers = [c for c in self.all if not c.connection.is_admitted]
        if len(strangers) >= _MOST_STRANGERS:
            # The oldest of the address that has most: one machine keeps no other one out.
            ((crowd, _),) = Counter(c.address for c in strangers).most_common(1)
            self._drop(next(c for c in strangers if c.address == crowd))
        caller = Caller(Connection(tcp_socket), str(address[0]))
        self.all.append(caller)
        self._selector.register(tcp_socket, selectors.EVENT_READ, caller)
        caller.connection.send("welcome", protocol=PROTOCOL, nonce=caller.nonce)

    def _send_away(self) -> None:
        """Accepts and closes a caller: left waiting, it would keep this thread busy."""
        if self._spare is not None:
            os.close(self._spare)
        with contextlib.suppress(OSError):
            self._listener.accept()[0].close()
        try:
            self._spare = os.open(os.devnull, os.O_RDONLY)
        except OSError:
            self._spare = None
            time.sleep(0.1)

    def _drop(self, caller: Caller) -> None:
        self.all.remove(caller)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(caller.connection.socket)
        caller.connection.close()
