"""A connection between two launchers: messages in lines, over TCP.

Before anything else, both sides prove that they know the token of the run. Each sends a random
text, and proves itself by a hash of the token with both texts, so that neither a stranger nor
an earlier recording can take part. After that, each message carries a hash of the token, its
number and its content. So nobody on the way can change, repeat or leave out one. The content
is not encrypted.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import selectors
import socket
import threading
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from tfdist.launch.messages import (
    BEFORE_ADMISSION,
    MOST_BYTES,
    MOST_BYTES_BEFORE,
    Message,
    decode,
    encode,
)

BEAT_S = 1.0
SILENCE_S = 10.0
"""A launcher that sends nothing for this many seconds counts as lost."""

_MAC_LENGTH = 32


@dataclass(frozen=True)
class Handshake:
    """The proofs that both sides of a connection know the token.

    Args:
        token: The token.
        coordinator_nonce: The random text of the coordinator, new for each connection.
        launcher_nonce: The random text of the launcher, new for each connection.
    """

    token: bytes
    coordinator_nonce: str
    launcher_nonce: str

    def _hash(self, purpose: str) -> str:
        # The purpose keeps a proof of one side from being a proof of the other.
        text = f"tfdist {purpose}\n{self.coordinator_nonce}\n{self.launcher_nonce}"
        return hmac.new(self.token, text.encode(), hashlib.sha256).hexdigest()

    @property
    def launcher_proof(self) -> str:
        """The proof of the launcher."""
        return self._hash("launcher")

    @property
    def coordinator_proof(self) -> str:
        """The proof of the coordinator."""
        return self._hash("coordinator")

    @property
    def launcher_key(self) -> bytes:
        """The key of the launcher's messages."""
        return self._hash("messages of the launcher").encode()

    @property
    def coordinator_key(self) -> bytes:
        """The key of the coordinator's messages."""
        return self._hash("messages of the coordinator").encode()


class Connection:
    """A connection between two launchers.

    Sending neither raises nor waits: what the peer does not take at once is kept, and sent with
    the next message. A peer that takes too little is cut off. One that is gone is noticed
    because it sends nothing.

    Args:
        connection: A connected socket.

    Attributes:
        socket: The socket; it does not block.
        is_open: Whether messages may still come.
        is_admitted: Whether both sides have proved that they know the token.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connection
        self.is_open = True
        self.is_admitted = False
        self._expected: Collection[str] = BEFORE_ADMISSION
        self._incomplete = b""
        self._unsent = b""
        self._keys = (b"", b"")
        self._sent = self._received = 0
        self._lock = threading.Lock()

    def secure(self, own_key: bytes, peer_key: bytes, expected: Collection[str]) -> None:
        """Admits the peer: from now on all messages carry a hash.

        Args:
            own_key: The key of the messages that are sent.
            peer_key: The key of the messages that are received.
            expected: The kinds of messages that the peer may send.
        """
        with self._lock:
            self._keys, self._expected, self.is_admitted = (own_key, peer_key), expected, True

    def send(self, kind: str, **fields: Any) -> None:
        """Sends a message.

        Args:
            kind: The kind of message.
            **fields: The content, in types that JSON has.
        """
        line = encode(kind, fields)
        with self._lock:
            if self.is_admitted:
                line = _mac(self._keys[0], self._sent, line) + line
                self._sent += 1
            self._unsent += line + b"\n"
            most = MOST_BYTES if self.is_admitted else MOST_BYTES_BEFORE
            with contextlib.suppress(OSError):
                self._unsent = self._unsent[self.socket.send(self._unsent) :]
            if len(self._unsent) > most:
                self.is_open = False

    def wait(self, seconds: float) -> None:
        """Waits until something can be read.

        Args:
            seconds: How long at most.
        """
        with selectors.DefaultSelector() as selector, contextlib.suppress(OSError, ValueError):
            selector.register(self.socket, selectors.EVENT_READ)
            selector.select(seconds)

    def received(self) -> Iterator[Message]:
        """Reads once, and yields the complete messages; a malformed one ends the connection."""
        try:
            data = self.socket.recv(1 << 16)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        *lines, self._incomplete = (self._incomplete + data).split(b"\n")
        for line in lines:
            message = self._opened(line)
            if message is None:
                self.is_open = False
                return
            yield message
            if not self.is_open:
                return
        if not data or len(self._incomplete) > self._most_bytes:
            self.is_open = False

    @property
    def _most_bytes(self) -> int:
        return MOST_BYTES + _MAC_LENGTH if self.is_admitted else MOST_BYTES_BEFORE

    def _opened(self, line: bytes) -> Message | None:
        """Returns the message of a line; None if it is malformed or not the peer's."""
        if len(line) > self._most_bytes:
            return None
        if self.is_admitted:
            mac, line = line[:_MAC_LENGTH], line[_MAC_LENGTH:]
            if not hmac.compare_digest(mac, _mac(self._keys[1], self._received, line)):
                return None
            self._received += 1
        return decode(line, self._expected)

    def close(self) -> None:
        """Ends the connection."""
        self.is_open = False
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


def _mac(key: bytes, number: int, line: bytes) -> bytes:
    digest = hmac.new(key, b"%d\n%b" % (number, line), hashlib.sha256).hexdigest()
    return digest[:_MAC_LENGTH].encode()
