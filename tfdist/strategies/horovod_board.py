"""Where ranks write how far they are, so that one that waits can say for whom."""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Mapping

_ASK_S = 5.0


class Board:
    """Notes of all ranks, kept by the rendezvous server that started them.

    Horovod's launcher and tfdist's keep that server, a plain store of texts over HTTP,
    running as long as the ranks.

    Args:
        address: "host:port" of the server.
        rank: Who writes here.
        size: How many ranks there are.
    """

    def __init__(self, address: str, rank: int, size: int) -> None:
        self._url = f"http://{address}/tfdist-progress"
        self._rank = rank
        self._size = size

    @classmethod
    def from_environment(
        cls, rank: int, size: int, environ: Mapping[str, str] = os.environ
    ) -> Board | None:
        """Finds the server; there is none under `mpirun`.

        Args:
            rank: Who writes.
            size: How many ranks there are.
            environ: The environment variables.
        """
        host = environ.get("HOROVOD_GLOO_RENDEZVOUS_ADDR")
        port = environ.get("HOROVOD_GLOO_RENDEZVOUS_PORT")
        return cls(f"{host}:{port}", rank, size) if host and port and size > 1 else None

    def write(self, note: str) -> None:
        """Replaces this rank's note."""
        request = urllib.request.Request(
            f"{self._url}/{self._rank}", data=note.encode(), method="PUT"
        )
        self._ask(request)

    def read(self) -> dict[int, str]:
        """Gives the notes of the ranks that wrote one."""
        notes = {
            rank: self._ask(urllib.request.Request(f"{self._url}/{rank}"))
            for rank in range(self._size)
        }
        return {rank: note for rank, note in notes.items() if note is not None}

    def _ask(self, request: urllib.request.Request) -> str | None:
        # What the board is for must not fail because of it.
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(request, timeout=_ASK_S) as answer:
                return str(answer.read().decode())
        except (OSError, ValueError):
            return None
