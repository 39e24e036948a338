"""Processes that are stopped: the launcher sees them in every phase and names the right one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tfdist.cluster.heartbeat import Heartbeat, WorkerProgress
from tfdist.errors import HUNG
from tfdist.launch import Failure, Worker, stopped
from tfdist.launch.restarts import RestartCause
from tfdist.launch.slots import ElasticSlots
from tfdist.launch.stopped import StoppedWorkers

pytestmark = [pytest.mark.quick, pytest.mark.waits]


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopped, "_POLL_S", 0.02)


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    started = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
    yield started
    for process in started:
        process.kill()
        process.wait()


def member(process: Any, index: int, steps: int = 0, **values: Any) -> Any:
    """A started worker of two, as far as it matters here."""
    config = {
        "cluster": {"worker": ["a:1", "b:1"]},
        "task": {"type": "worker", "index": index},
    }
    environment = {"TFDIST_HANG_LIMIT": "0.1", "TF_CONFIG": json.dumps(config)}
    environment |= values.pop("environ", {})
    heartbeat = Heartbeat()
    heartbeat.record_steps(0, steps, steps)
    worker = Worker(index, ("x",), environment, **values)
    return SimpleNamespace(
        worker=worker, process=process, ended_at=None, heartbeat=heartbeat, reason=""
    )


def lost(members: list[Any], seconds: float = 0.4) -> dict[str, str]:
    """Watches for a while, and gives who was found, by task, and why."""
    watch, found = StoppedWorkers(), {}
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for notice in watch.notices(members):
            assert notice.is_lost
            found[notice.member.worker.task] = notice.text
            notice.member.reason = notice.text
        if len(found) == len(members):
            break
        time.sleep(0.05)
    return found


def stop(*processes: subprocess.Popen[bytes]) -> None:
    for process in processes:
        os.kill(process.pid, signal.SIGSTOP)


def test_one_that_is_stopped_while_workers_start(processes: Any) -> None:
    stop(processes[1])
    found = lost([member(processes[0], 0), member(processes[1], 1)])
    assert list(found) == ["worker 1"]
    assert "worker 1 has been stopped (SIGSTOP) for " in found["worker 1"]
    assert "TFDIST_HANG_LIMIT=0.1" in found["worker 1"]


def test_all_that_are_stopped(processes: Any) -> None:
    stop(*processes)
    found = lost([member(process, i, steps=3) for i, process in enumerate(processes)])
    assert list(found) == ["worker 0", "worker 1"]


def test_one_of_another_machine_s_run(processes: Any) -> None:
    stop(processes[1])
    assert list(lost([member(processes[1], 1)])) == ["worker 1"]


def test_a_chief_and_a_server(processes: Any) -> None:
    stop(*processes)
    chief = member(processes[0], 0, steps=3, job="chief")
    server = member(processes[1], 0, job="ps", serves=True)
    assert list(lost([chief, server])) == ["chief", "ps 0"]


def test_a_chief_that_trains_reports_nothing_of_itself(processes: Any) -> None:
    stop(processes[0])
    chief = member(processes[0], 0, steps=3, job="chief")
    server = member(processes[1], 0, job="ps", serves=True)
    assert list(lost([chief, server])) == ["chief"]


@pytest.mark.parametrize(
    ("environ", "steps_of_other"),
    [
        ({"TFDIST_ON_HANG": "report"}, 0),
        ({"TFDIST_HANG_LIMIT": "0"}, 0),
        ({}, 3),  # whose watchdog reports first, and says more
    ],
)
def test_who_is_left_alone(processes: Any, environ: Any, steps_of_other: int) -> None:
    stop(processes[1])
    members = [
        member(processes[0], 0, steps_of_other, environ=environ),
        member(processes[1], 1, environ=environ),
    ]
    assert lost(members) == {}


def test_a_run_of_one_worker_may_be_paused(processes: Any) -> None:
    stop(processes[0])
    assert lost([member(processes[0], 0, environ={"TF_CONFIG": ""})]) == {}


def test_the_script_s_own_limit_counts(processes: Any) -> None:
    stop(processes[1])
    members = [member(process, i) for i, process in enumerate(processes)]
    members[1].heartbeat.record_hang_limit(0)
    assert lost(members) == {}
    members[1].heartbeat.record_hang_limit(0.1)
    assert list(lost(members)) == ["worker 1"]


def test_one_that_is_silent_is_named_once(processes: Any) -> None:
    members = [member(process, i) for i, process in enumerate(processes)]
    watch, texts = StoppedWorkers(), []
    members[1].heartbeat.beat()
    deadline = time.monotonic() + 0.5
    while time.monotonic() < deadline:
        members[0].heartbeat.beat()
        texts += [notice.text for notice in watch.notices(members) if not notice.is_lost]
        time.sleep(0.05)
    (text,) = texts
    assert text.startswith("worker 1 has not answered its launcher for ")
    assert "interpreter lock" in text


def plan(count: int) -> list[Worker]:
    return [Worker(i, ("x",), {"CUDA_VISIBLE_DEVICES": str(i)}) for i in range(count)]


def test_who_hangs_is_left_out_and_not_who_says_so() -> None:
    slots = ElasticSlots(plan, 1, 2)
    reporter, _ = slots.workers
    hung = Failure(reporter, HUNG, (), WorkerProgress(9, 0, 9, lost=1))
    assert not slots.leaves_out(hung)
    slots.plan_next_start(hung)
    assert slots.leaves_out(hung)
    slots.plan_next_start(hung)
    (left,) = slots.workers
    assert left.environment["CUDA_VISIBLE_DEVICES"] == "0"
    cause = RestartCause.of(hung)
    assert cause.what.startswith("worker 1 does not answer. worker 0 has reported it")


def test_a_hang_of_unknown_cause_leaves_nobody_out() -> None:
    slots = ElasticSlots(plan, 1, 2)
    hung = Failure(slots.workers[0], HUNG, ())
    for _ in range(3):
        assert not slots.leaves_out(hung)
        slots.plan_next_start(hung)
    assert len(slots.workers) == 2


def test_the_heartbeat_carries_who_is_lost() -> None:
    heartbeat = Heartbeat()
    assert heartbeat.read().lost is None
    heartbeat.record_lost(0)
    assert heartbeat.read().lost == 0
    assert heartbeat.hang_limit(60) == 60
