"""A key-value store whose calls may not come back."""

from __future__ import annotations

import threading
import time

import pytest

from tfdist.cluster.key_value_store import Limited
from tfdist.strategies.horovod.store import RendezvousStore

pytestmark = pytest.mark.quick


def test_a_call_that_does_not_return_is_left_and_no_other_begins() -> None:
    limited, free = Limited(0.2), threading.Event()
    assert limited.call(lambda: 1) == 1
    began = time.monotonic()
    assert limited.call(free.wait) is None
    assert limited.call(lambda: 2) is None
    assert time.monotonic() - began < 2
    free.set()
    deadline = time.monotonic() + 10
    while limited.call(lambda: 3) != 3:
        assert time.monotonic() < deadline


def test_a_rendezvous_that_is_gone_gives_no_notes() -> None:
    assert RendezvousStore.from_environment("g", 2, {}) is None
    where = {"HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1", "HOROVOD_GLOO_RENDEZVOUS_PORT": "9"}
    assert RendezvousStore.from_environment("g", 1, where) is None
    store = RendezvousStore.from_environment("g", 2, where)
    assert store is not None
    assert not store.post("a", "b")
    assert store.read_all("a") == {}
