"""SIGTERM while a training is saved."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

import pytest

from tfdist.resume.checkpoint.preemption import Preemption

pytestmark = pytest.mark.cluster


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def forked(function: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            function()
        finally:
            os._exit(0)
    return pid


def status_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_it_is_heard_while_the_context_lasts() -> None:
    calls: list[int] = []
    usual = signal.signal(signal.SIGTERM, lambda number, frame: calls.append(number))
    try:
        preemption = Preemption()
        with preemption.listening():
            assert not preemption.is_requested
            os.kill(os.getpid(), signal.SIGTERM)
            assert preemption.is_requested
            os.kill(os.getpid(), signal.SIGTERM)  # the launcher's, of the same request
            time.sleep(0.2)
        assert calls == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert calls == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, usual)


def test_a_second_one_ends_the_process() -> None:

    def wait() -> None:
        preemption = Preemption()
        with preemption.listening():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1.2)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

    assert status_of(forked(wait)) == 128 + signal.SIGTERM


def test_a_child_is_ended_and_its_signal_is_not_the_parents() -> None:
    preemption = Preemption()
    with preemption.listening():
        children: list[int] = []
        thread = threading.Thread(
            target=lambda: children.append(forked(lambda: time.sleep(30)))
        )
        thread.start()
        thread.join()
        children.append(forked(lambda: time.sleep(30)))
        time.sleep(0.2)
        for child in children:
            os.kill(child, signal.SIGTERM)
        assert [status_of(child) for child in children] == [-signal.SIGTERM] * 2
        time.sleep(0.2)
        assert not preemption.is_requested
