"""Messages between the launchers of several machines: JSON, a line each, over TCP."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import socket
from collections.abc import Iterator
from typing import Any

TOKEN = "TFDIST_TOKEN"
"""Environment variable: if it is set, a secret that all launchers of a run must share."""

BEAT_S = 1.0
SILENCE_S = 10.0
"""A launcher that sends nothing for this many seconds counts as lost."""

_MOST_BYTES = 1 << 20


class Connection:
    """A connection between two launchers.

    Sending never raises: a peer that is gone is noticed because it sends nothing.

    Args:
        connection: A connected socket.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(2.0)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connection
        self.is_open = True
        self._incomplete = b""

    def send(self, kind: str, **fields: Any) -> None:
        """Sends a message.

        Args:
            kind: The kind of message.
            **fields: The content, in types that JSON has.
        """
        with contextlib.suppress(OSError):
            self.socket.sendall(json.dumps({"kind": kind, **fields}).encode() + b"\n")

    def received(self) -> Iterator[dict[str, Any]]:
        """Reads once, and yields the complete messages; a malformed one ends the connection."""
        try:
            data = self.socket.recv(1 << 16)
        except TimeoutError:
            return
        except OSError:
            data = b""
        *lines, self._incomplete = (self._incomplete + data).split(b"\n")
        if not data or len(self._incomplete) > _MOST_BYTES:
            self.is_open = False
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError:
                message = None
            if not isinstance(message, dict) or "kind" not in message:
                self.is_open = False
                return
            yield message

    def close(self) -> None:
        """Ends the connection."""
        self.is_open = False
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


def proof(nonce: str) -> str:
    """Proves that this machine knows the token, without sending it.

    Args:
        nonce: The random text that the coordinator made for this connection.
    """
    token = os.environ.get(TOKEN, "")
    return hmac.new(token.encode(), nonce.encode(), hashlib.sha256).hexdigest()
