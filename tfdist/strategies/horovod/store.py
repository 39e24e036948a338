"""The key-value store of ranks that Horovod connects: at the rendezvous that started them."""

from __future__ import annotations

import os
import urllib.parse
import urllib.request
from collections.abc import Mapping

from tfdist.cluster.key_value_store import KeyValueStore

_ASK_S = 5.0


class RendezvousBoard(KeyValueStore):
    """Notes kept by the rendezvous server, a plain store of texts over HTTP.

    Horovod's launcher and tfdist's keep it running as long as the ranks, in a process of its
    own.

    Args:
        address: "host:port" of the server.
        group: Names the ranks that train together.
        size: How many they are.
    """

    def __init__(self, address: str, group: str, size: int) -> None:
        super().__init__(size)
        self._url = f"http://{address}/tfdist-{group}"

    @classmethod
    def from_environment(
        cls, group: str, size: int, environ: Mapping[str, str] = os.environ
    ) -> RendezvousBoard | None:
        """Finds the server; there is none under `mpirun`.

        Args:
            group: Names the ranks that train together.
            size: How many they are.
            environ: The environment variables.
        """
        host = environ.get("HOROVOD_GLOO_RENDEZVOUS_ADDR")
        port = environ.get("HOROVOD_GLOO_RENDEZVOUS_PORT")
        return cls(f"{host}:{port}", group, size) if host and port and size > 1 else None

    def post(self, name: str, text: str) -> bool:
        """Puts a note in the place of what was there."""
        request = urllib.request.Request(self._address(name), text.encode(), method="PUT")
        return self._ask(request) is not None

    def read(self, name: str) -> str | None:
        """Gives a note."""
        return self._ask(urllib.request.Request(self._address(name)))

    def _address(self, name: str) -> str:
        # The server knows a scope and a key, and no deeper path.
        return f"{self._url}/{urllib.parse.quote(name.replace('/', ':'), safe=':')}"

    def _ask(self, request: urllib.request.Request) -> str | None:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(request, timeout=_ASK_S) as answer:
                return str(answer.read().decode())
        except (OSError, ValueError):
            return None
