"""What is started again, and the coordinator of the launchers of several hosts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from tests.jobs import free_port
from tfdist.cluster.heartbeat import Heartbeat, WorkerProgress
from tfdist.errors import LaunchError
from tfdist.launch import CoordinatorClient, Failure, Host, Restarts, Worker, parse_elastic
from tfdist.launch.coordinator import Coordinator
from tfdist.launch.restarts import RestartCause

pytestmark = pytest.mark.quick

HOSTS = (Host("a"), Host("b", 2))


def failure(
    returncode: int, step: int = 3, preempted: bool = False, *lines: str
) -> RestartCause:
    progress = WorkerProgress(steps_made=step, epoch=1, step=step, preempted=preempted)
    return RestartCause.of(Failure(Worker(1, ("x",), {}), returncode, lines, progress, 0.0))


def test_the_same_failure_at_the_same_step_repeats() -> None:
    restarts = Restarts(9)
    raised = "Traceback (most recent call last):", "ValueError: a"
    first = failure(1, 3, False, *raised)
    assert restarts.allows(first)
    restarts.record(first, "")
    assert not restarts.allows(failure(1, 3, False, *raised))
    assert restarts.allows(failure(1, 3, False, *raised), changes=True)
    assert restarts.allows(failure(1, 4, False, *raised))
    assert restarts.allows(failure(-9, 3))
    assert restarts.allows(failure(1, 3, False, raised[0], "ValueError: b"))


def test_what_is_started_again() -> None:
    careful = Restarts(9, of_exceptions=False)
    assert careful.allows(failure(-9))
    assert careful.allows(failure(75))
    assert not careful.allows(failure(1))
    for interrupted in (-2, 130):
        assert not Restarts(9).allows(failure(interrupted))
    preempted = failure(75, preempted=True)
    restarts = Restarts(2)
    restarts.record(preempted, "")
    assert restarts.allows(preempted)  # a scheduler may do so twice at a step
    restarts.record(preempted, "")
    assert not restarts.allows(preempted)


def test_a_cause_survives_its_journey() -> None:
    cause = failure(-9)
    assert RestartCause.from_json(cause.to_json()) == cause


def test_a_heartbeat_says_how_far_a_worker_is() -> None:
    heartbeat = Heartbeat()
    assert heartbeat.read().where == "before its first step"
    heartbeat.record_steps(0, 7, 2)
    heartbeat.record_steps(1, 1, 2)
    heartbeat.set_flags(saves=True)
    assert heartbeat.read() == WorkerProgress(steps_made=4, epoch=1, step=1, saves=True)
    assert heartbeat.read().where == "after step 1 of epoch 2"
    assert not heartbeat.must_end
    heartbeat.ask_for_end()
    assert heartbeat.must_end


@pytest.mark.parametrize("text", ["", "2", "2:1", "0:2", "a:b", "1:2:3", "-1:2"])
def test_malformed_numbers_of_an_elastic_run(text: str) -> None:
    with pytest.raises(LaunchError, match="`--elastic` must be two numbers"):
        parse_elastic(text)


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def coordinator(port: int) -> Iterator[Coordinator]:
    coordinator = Coordinator(port, "token", HOSTS, {}, Restarts(1), limit=20)
    yield coordinator
    coordinator.close()


def link(port: int, rank: int) -> CoordinatorClient:
    return CoordinatorClient(("127.0.0.1", port), "token", rank, {}, Restarts(1), limit=20)


def meet(*links: CoordinatorClient) -> list[object]:
    with ThreadPoolExecutor(len(links)) as pool:
        return list(pool.map(lambda one: one.meet((), print), links))


def decision_of(one: CoordinatorClient) -> tuple[bool, RestartCause | None]:
    deadline = time.monotonic() + 10
    while one.decision is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return one.decision.again, one.decision.cause


def test_launchers_start_together_and_again_and_end_together(
    coordinator: Coordinator, port: int
) -> None:
    both = link(port, 0), link(port, 1)
    assert meet(*both) == [None, None]
    lost = failure(-9)
    both[1].report_failure(lost)
    assert [decision_of(one) for one in both] == [(True, lost), (True, lost)]
    assert meet(*both) == [None, None]
    later = replace(lost, where="later", signature=("x",))
    both[0].report_failure(later)  # one restart was allowed
    assert [decision_of(one) for one in both] == [(False, later), (False, later)]
    for one in both:
        one.close()


def test_the_run_is_over_when_all_have_ended_well(coordinator: Coordinator, port: int) -> None:
    both = link(port, 0), link(port, 1)
    meet(*both)
    both[0].report_done()
    time.sleep(0.5)
    assert both[0].decision is None
    both[1].report_done()
    assert [decision_of(one) for one in both] == [(False, None), (False, None)]
    for one in both:
        one.close()


def test_a_node_twice_is_refused(coordinator: Coordinator, port: int) -> None:
    both = link(port, 0), link(port, 1)
    meet(*both)
    with pytest.raises(LaunchError, match="Received: --node-rank 1 twice"):
        link(port, 1).meet((), print)
    for one in both:
        one.close()


def test_a_host_that_was_refused_is_not_only_missing(port: int) -> None:
    coordinator = Coordinator(port, "token", HOSTS, {"version": 1}, Restarts(1), limit=60)
    first = CoordinatorClient(
        ("127.0.0.1", port), "token", 0, {"version": 1}, Restarts(1), limit=20
    )
    other = CoordinatorClient(
        ("127.0.0.1", port), "token", 1, {"version": 2}, Restarts(1), limit=20
    )
    try:
        with pytest.raises(LaunchError, match="`version` must be the same on all hosts"):
            other.meet((), print)
        with ThreadPoolExecutor(1) as pool:
            meeting = pool.submit(first.meet, (), print)
            while not any(c.rank == 0 for c in coordinator._launchers):
                time.sleep(0.02)
            coordinator._limit = 0
            decision = meeting.result(20)
        assert decision is not None
        assert decision.cause is not None
        assert "node 1 (b) did not come within 0 s" in decision.cause.what
        assert "node 1 (b) was refused: `version` must be the same" in decision.cause.what
    finally:
        first.close()
        other.close()
        coordinator.close()


def test_the_first_host_must_answer(port: int) -> None:
    lonely = CoordinatorClient(("127.0.0.1", port), "token", 1, {}, Restarts(1), limit=1)
    with pytest.raises(LaunchError, match=r"no answer from 127\.0\.0\.1"):
        lonely.meet((), print)
