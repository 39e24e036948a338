"""The key-value store of the rendezvous server, for ranks that Horovod connects."""

from __future__ import annotations

import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping

from tfdist.cluster.key_value_store import KeyValueStore

_TIMEOUT_S = 5.0
_FORBIDDEN = 403


class RendezvousStore(KeyValueStore):
    """Values on the rendezvous server, which stores texts over HTTP.

    The launcher, Horovod's or tfdist's, runs the server in a process of its own as long as
    the ranks run.

    Args:
        address: "host:port" of the server, or with a secret as in `launch.horovod.ADDRESS`.
        group: Name of the group of ranks that train together.
        size: Number of ranks in the group.
    """

    def __init__(self, address: str, group: str, size: int) -> None:
        super().__init__(size)
        self._url = f"http://{address}/tfdist-{group}"

    @classmethod
    def from_environment(
        cls, group: str, size: int, environ: Mapping[str, str] = os.environ
    ) -> RendezvousStore | None:
        """Returns the store, or None if there is no server, as under `mpirun`.

        Args:
            group: Name of the group of ranks that train together.
            size: Number of ranks in the group.
            environ: The environment variables.
        """
        host = environ.get("HOROVOD_GLOO_RENDEZVOUS_ADDR")
        port = environ.get("HOROVOD_GLOO_RENDEZVOUS_PORT")
        return cls(f"{host}:{port}", group, size) if host and port and size > 1 else None

    def post(self, name: str, text: str) -> bool:
        """Sets the value of a key, in place of an earlier value."""
        request = urllib.request.Request(self._url_of(name), text.encode(), method="PUT")
        return self._send(request) is not None

    def read(self, name: str) -> str | None:
        """Returns the value of a key, or None."""
        return self._send(urllib.request.Request(self._url_of(name)))

    def _url_of(self, name: str) -> str:
        # The server's paths have a scope and a key, and nothing deeper.
        return f"{self._url}/{urllib.parse.quote(name.replace('/', ':'), safe=':')}"

    def _send(self, request: urllib.request.Request) -> str | None:
        # A proxy of the environment would be asked for the launcher, which it cannot reach.
        without_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with without_proxy.open(request, timeout=_TIMEOUT_S) as response:
                return str(response.read().decode())
        except (OSError, ValueError):
            return None


def refuses(address: str) -> bool:
    """Returns whether the rendezvous server refuses the secret of this process.

    Args:
        address: As for `RendezvousStore`.
    """
    without_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        without_proxy.open(f"http://{address}/tfdist/secret", timeout=_TIMEOUT_S).close()
    except urllib.error.HTTPError as error:
        with error:
            return error.code == _FORBIDDEN
    except (OSError, ValueError):
        return False
    return False
