"""SIGTERM while a training is saved."""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tfdist.resume.checkpoint.preemption import Preemption
from tfdist.step.signals import StopState

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


def test_a_warning_saves_once_and_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    preemption, stop = Preemption(), StopState()
    calls: list[bool] = []
    preemption.on_request = lambda: calls.append(preemption.is_warned)
    with preemption.listening():
        os.kill(os.getpid(), signal.SIGUSR1)
        assert preemption.is_warned
        assert not preemption.is_requested
        stop.warned = True
        assert not preemption.takes_warning(stop, is_alone=False)  # the others do not know yet
        stop.saving = True
        assert preemption.takes_warning(stop, is_alone=False)
        time.sleep(0.2)  # the listening thread has heard it too
        assert calls == [True]
        assert not preemption.is_warned
        assert not preemption.takes_warning(stop, is_alone=False)
        assert not preemption.takes_warning(stop, is_alone=True)
        monkeypatch.setenv("TFDIST_ON_WARNING", "end")
        os.kill(os.getpid(), signal.SIGUSR2)
        assert preemption.is_requested
        time.sleep(1.2)
        os.kill(os.getpid(), signal.SIGTERM)  # the first of its kind: it does not end at once
        time.sleep(0.1)
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_a_warning_that_somebody_else_handles_is_left_to_them(tmp_path: Path) -> None:
    calls: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, frame: calls.append(number))
    preemption = Preemption()
    try:
        with (tmp_path / "stacks").open("w") as file:
            faulthandler.register(signal.SIGUSR2, file)  # Python does not know of this handler
            with preemption.listening():
                os.kill(os.getpid(), signal.SIGUSR1)
                os.kill(os.getpid(), signal.SIGUSR2)
                time.sleep(0.1)
    finally:
        faulthandler.unregister(signal.SIGUSR2)
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    assert calls == [signal.SIGUSR1]
    assert not preemption.is_warned
    assert "test_preemption" in (tmp_path / "stacks").read_text()


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
