"""The meeting of workers: strangers neither end it nor hold it up, and IPv6 works."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.jobs import free_port
from tfdist.cluster import Cluster
from tfdist.cluster.greetings import Greeting
from tfdist.cluster.listening import bound_everywhere
from tfdist.cluster.rendezvous import meet
from tfdist.errors import StrategyError

pytestmark = [pytest.mark.quick, pytest.mark.waits]


def pair(host: str = "127.0.0.1") -> tuple[str, str]:
    port = free_port()
    return f"{host}:{port}", f"{host}:{port + 1}"


def worker(addresses: tuple[str, str], index: int) -> Cluster:
    return Cluster({"worker": addresses}, "worker", index, "TF_CONFIG")


def called(address: str) -> socket.socket:
    deadline = time.monotonic() + 10
    while True:
        try:
            return socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), 5)
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def slowly(stranger: socket.socket, is_over: threading.Event) -> None:
    while not is_over.wait(0.1):
        stranger.send(b" ")


@pytest.mark.parametrize(
    "speak",
    [
        lambda stranger, is_over: stranger.sendall(b"[" * 100_000 + b"\n"),
        lambda stranger, is_over: stranger.sendall(b"x" * 3_000_000),
        lambda stranger, is_over: stranger.sendall(b'[9999999, ["a:1", "b:1"], "evil"]\n'),
        lambda stranger, is_over: stranger.sendall(b'[true, ["a:1"], "evil"]\n'),
        lambda stranger, is_over: is_over.wait(20),
        slowly,
    ],
)
def test_a_stranger_does_not_hold_up_the_meeting(
    speak: Callable[[socket.socket, threading.Event], Any],
) -> None:
    addresses, is_over = pair(), threading.Event()
    problems: list[BaseException] = []

    def speaks() -> None:
        with (
            called(addresses[0]) as stranger,
            contextlib.suppress(OSError),
        ):  # it was hung up on
            speak(stranger, is_over)

    def comes() -> None:
        try:
            time.sleep(0.5)
            meet(worker(addresses, 1), 20)
        except StrategyError as error:
            problems.append(error)

    threads = [threading.Thread(target=target) for target in (speaks, comes)]
    for thread in threads:
        thread.start()
    began = time.monotonic()
    try:
        meet(worker(addresses, 0), 20)
    finally:
        is_over.set()
        for thread in threads:
            thread.join(20)
    assert time.monotonic() - began < 10
    assert not problems


def test_slow_bytes_do_not_lengthen_its_limit() -> None:
    addresses, is_over = pair(), threading.Event()

    def speaks() -> None:
        while not is_over.is_set():
            with called(addresses[0]) as stranger:
                try:
                    slowly(stranger, is_over)
                except OSError:
                    continue

    thread = threading.Thread(target=speaks)
    thread.start()
    began = time.monotonic()
    try:
        with pytest.raises(StrategyError, match="no answer from worker 1"):
            meet(worker(addresses, 0), 1)
    finally:
        is_over.set()
        with bound_everywhere(int(addresses[0].rpartition(":")[2])) as again:
            again.listen()  # for the stranger that may just call
            thread.join(20)
    assert time.monotonic() - began < 5


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_workers_meet_over_ipv6() -> None:
    addresses = pair("[::1]")
    other = threading.Thread(target=meet, args=(worker(addresses, 1), 20))
    other.start()
    meet(worker(addresses, 0), 20)
    other.join(20)
    assert not other.is_alive()


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_what_listens_everywhere_answers_both_families() -> None:
    with bound_everywhere(0) as listener:
        listener.listen()
        port = listener.getsockname()[1]
        for host in ("127.0.0.1", "::1"):
            socket.create_connection((host, port), 5).close()
        with pytest.raises(OSError, match="in use"):
            bound_everywhere(port)


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
values = st.recursive(plain, lambda inner: st.lists(inner, max_size=4), max_leaves=9)


@given(line=st.binary(max_size=99) | values.map(lambda value: json.dumps(value).encode()))
@settings(max_examples=200, deadline=None, database=None)
def test_any_line_is_a_greeting_or_none(line: bytes) -> None:
    greeting = Greeting.read(line, workers=2)
    if greeting is not None:
        assert Greeting.read(greeting.line()[:-1], workers=2) == greeting
