"""Horovod's rendezvous server as tfdist runs it: with a secret, limits, and one address."""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import threading
import time
from collections.abc import Iterator

import psutil
import pytest

from tfdist.launch import Host
from tfdist.launch.horovod import ADDRESS, PORT, rank_environments, secret_for
from tfdist.launch.horovod_rendezvous import MOST_BYTES, rendezvous
from tfdist.launch.plan import free_addresses
from tfdist.strategies.horovod.store import RendezvousStore, refuses

pytest.importorskip("horovod")
pytestmark = [pytest.mark.quick, pytest.mark.waits]
SECRET = "0123456789abcdef"


@pytest.fixture
def address() -> Iterator[str]:
    """The address of a server that runs, with the secret as ranks have it."""
    (free,) = free_addresses(1)
    (first, _) = rank_environments([Host("127.0.0.1", 2)], 0, free, SECRET)
    with rendezvous(first, ()):
        yield f"{first[ADDRESS]}:{first[PORT]}"


def ask(address: str, method: str, path: str, body: bytes | None = None) -> int:
    host_and_port, _, secret = address.partition("/")
    server = http.client.HTTPConnection(host_and_port, timeout=20)
    with contextlib.closing(server):
        server.request(method, f"/{path.format(secret=secret)}", body)
        return server.getresponse().status


def test_ranks_and_their_watchers_know_the_secret(address: str) -> None:
    store = RendezvousStore(address, "group-0", 2)
    assert store.post("watch/1", "a text")
    assert store.read("watch/1") == "a text"
    assert ask(address, "GET", "{secret}/tfdist-group-0/watch:1") == 200
    assert not refuses(address)
    assert refuses(address.replace(SECRET, "another"))
    assert refuses(address.partition("/")[0])


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "tfdist-group-0/watch:0", None, 403),
        ("PUT", "tfdist-group-0/hang", b"{}", 403),
        ("DELETE", "global/0", None, 403),
        ("HEAD", "pyproject.toml", None, 403),
        ("GET", "", None, 403),
        ("GET", "%2e%2e/{secret}/x/y", None, 403),
        ("HEAD", "{secret}/pyproject.toml", None, 405),
        ("POST", "{secret}/a/b", b"", 405),
        ("GET", "{secret}/a", None, 400),
        ("GET", "{secret}/a/b/c", None, 400),
        ("PUT", "{secret}/a//", b"", 400),
        ("PUT", "{secret}/a/" + "b" * 300, b"", 400),
    ],
)
def test_what_is_not_served(
    method: str, path: str, body: bytes | None, status: int, address: str
) -> None:
    assert ask(address, method, path, body) == status


def test_a_value_has_a_limit(address: str) -> None:
    host_and_port, _, secret = address.partition("/")
    host, _, port = host_and_port.partition(":")
    for length in ("", "Content-Length: -1\r\n", f"Content-Length: {MOST_BYTES + 1}\r\n"):
        with socket.create_connection((host, int(port)), 5) as stranger:
            stranger.sendall(f"PUT /{secret}/a/b HTTP/1.0\r\n{length}\r\n".encode())
            assert int(stranger.recv(100).split()[1]) in (411, 413)
    assert ask(address, "PUT", "{secret}/a/b", b"x" * MOST_BYTES) == 200


def test_nonsense_is_survived_and_slow_callers_do_not_hold_up_its_end() -> None:
    (free,) = free_addresses(1)
    (first, _) = rank_environments([Host("127.0.0.1", 2)], 0, free, SECRET)
    host, _, port = free.partition(":")
    rng, is_over = random.Random(1), threading.Event()

    def speaks() -> None:
        strangers = [socket.create_connection((host, int(port)), 5) for _ in range(30)]
        while not is_over.wait(0.2):
            for stranger in strangers:
                with contextlib.suppress(OSError):
                    stranger.send(bytes([rng.randrange(32, 127)]))
        for stranger in strangers:
            stranger.close()

    with rendezvous(first, ()):
        for _ in range(30):
            with socket.create_connection((host, int(port)), 5) as stranger:
                stranger.sendall(rng.randbytes(rng.randrange(1, 999)) + b"\r\n\r\n")
        thread = threading.Thread(target=speaks)
        thread.start()
        time.sleep(0.5)
        assert not refuses(f"{first[ADDRESS]}:{first[PORT]}")
        began = time.monotonic()
    seconds = time.monotonic() - began
    is_over.set()
    thread.join(10)
    assert seconds < 8


def test_it_listens_on_one_address(address: str) -> None:
    port = int(address.rpartition(":")[2])
    listening = {
        connection.laddr.ip
        for connection in psutil.Process().net_connections("inet")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    }
    assert listening == {"127.0.0.1"}


def test_launchers_with_one_token_have_one_secret() -> None:
    assert secret_for({}, is_alone=False) == ""
    assert secret_for({"TFDIST_TOKEN": "a"}, False) == secret_for({"TFDIST_TOKEN": "a"}, False)
    assert secret_for({"TFDIST_TOKEN": "a"}, False) != secret_for({"TFDIST_TOKEN": "b"}, False)
    assert secret_for({}, is_alone=True) != secret_for({}, is_alone=True)
