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
"""Environment variable: a secret that all launchers of a run must know, if it is set."""

BEAT_S = 1.0
SILENCE_S = 10.0
"""Who says nothing for so long is lost: its machine, or the way to it."""

_LONGEST = 1 << 20


class Wire:
    """One connection. Sending never raises: who does not hear is noticed by its silence.

    Args:
        connection: A connected socket.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(2.0)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connection
        self.is_open = True
        self._begun = b""

    def send(self, kind: str, **fields: Any) -> None:
        """Sends a message.

        Args:
            kind: Of it.
            **fields: What JSON knows.
        """
        with contextlib.suppress(OSError):
            self.socket.sendall(json.dumps({"kind": kind, **fields}).encode() + b"\n")

    def received(self) -> Iterator[dict[str, Any]]:
        """Reads once, and gives the messages that are whole; nonsense is the end too."""
        try:
            data = self.socket.recv(1 << 16)
        except TimeoutError:
            return
        except OSError:
            data = b""
        *lines, self._begun = (self._begun + data).split(b"\n")
        if not data or len(self._begun) > _LONGEST:
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
    """Shows that this machine knows the token, without sending it.

    Args:
        nonce: What the other side has drawn for this connection.
    """
    token = os.environ.get(TOKEN, "")
    return hmac.new(token.encode(), nonce.encode(), hashlib.sha256).hexdigest()
