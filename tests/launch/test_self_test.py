"""`tfdist test`: what its numbers mean, its connections, and real runs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.jobs import QUIET, free_port
from tfdist.cluster import links as kept_links
from tfdist.errors import LaunchError
from tfdist.launch import Host
from tfdist.launch.self_test import reach
from tfdist.launch.self_test.fit import Line, fit_line
from tfdist.launch.self_test.link import HostLink, measure, serve
from tfdist.launch.self_test.peers import Peers, peers_of_hosts
from tfdist.launch.self_test.result import ALL_REDUCE, Compared, Result, Speed
from tfdist.launch.self_test.verdicts import smallest_step, verdicts
from tfdist.scripts.self_test.trainings import distance

quick = pytest.mark.quick
LIMIT_S = 400
COMMAND = [sys.executable, "-m", "tfdist.cli", "test", "--largest", "1"]


def result(*flops: float, **fields: Any) -> Result:
    speeds = tuple(Speed(i, f"node{i}", "CPU", f, 1) for i, f in enumerate(flops))
    of_all = {"sums_are_exact": True, "trainings": (), "timings": (), **fields}
    return Result("multi_worker", "", len(flops), len(flops), speeds=speeds, **of_all)


def texts(found: Result, **options: Any) -> list[str]:
    given: dict[str, Any] = {"lines": {}, "links": (), "hosts": 2, "cores": 2, **options}
    return [f"{v.kind}: {v.text}" for v in verdicts(found, **given)]


@quick
class TestNumbers:
    def test_points_on_a_line_give_the_line(self):
        sizes = [1 << bits for bits in range(10, 27, 2)]
        line = fit_line([(size, 0.003 + size / 2e8) for size in sizes])
        assert line.latency_s == pytest.approx(0.003)
        assert line.bytes_per_s == pytest.approx(2e8)

    def test_the_fit_is_that_of_weighted_least_squares(self):
        rng = np.random.default_rng(0)
        sizes = np.array([1 << bits for bits in range(10, 27, 2)], np.float64)
        times = (0.003 + sizes / 2e8) * rng.uniform(0.8, 1.25, sizes.size)
        columns = np.stack([1 / times, sizes / times], 1)
        (latency, slope), *_ = np.linalg.lstsq(columns, np.ones(sizes.size), rcond=None)
        line = fit_line(list(zip(sizes, times, strict=True)))
        assert line.latency_s == pytest.approx(latency)
        assert 1 / line.bytes_per_s == pytest.approx(slope)

    def test_neither_part_of_a_line_is_negative(self):
        assert fit_line([(1000, 0.0001), (10000, 0.002)]).latency_s == 0
        falling = fit_line([(1000, 0.002), (100_000, 0.001)])
        assert falling.latency_s > 0
        assert falling.bytes_per_s == pytest.approx(1e8)

    def test_a_second_replica_pays_above_twice_the_time_of_an_all_reduce(self):
        line = Line(0.01, 1e8)
        alone = smallest_step(line, 4e6, 2)
        assert alone == pytest.approx(2 * 0.05)
        assert alone / 2 + line.seconds(4e6) == pytest.approx(alone)
        of_five = smallest_step(line, 4e6, 5)
        assert of_five / 5 + line.seconds(4e6) == pytest.approx(of_five)
        said = "204 Mbit/s in an all-reduce: with 1 million weights, below 334 ms a step"
        assert said in texts(result(1, 1), lines={ALL_REDUCE: Line(0.01, 25.5e6)})[0]


@quick
class TestVerdicts:
    def test_a_slow_worker_is_named(self):
        (text,) = texts(result(4e9, 4e9, 1e9, 3.9e9))
        assert text.startswith(
            "warning: worker 2 (on node2) is 4.0 times slower than the others"
        )
        assert texts(result(4e9, 3e9)) == []

    def test_a_slow_link_and_a_slow_direction_are_named(self):
        def link(target: str, to: float, back: float) -> HostLink:
            return HostLink("a", target, 1e-4, to, back)

        fast = [link("b", 1.25e8, 1.25e8), link("c", 1.25e8, 1.3e8)]
        assert texts(result(1, 1, 1, 1), links=fast) == []
        slow = [*fast, link("d", 1.25e7, 1.25e8)]
        of_link, of_direction = texts(result(1, 1, 1, 1), links=slow)
        assert "The link to d carries 100 Mbit/s, those to the other hosts 1 Gb" in of_link
        assert "from a to d carries 100 Mbit/s, in the other direction 1 Gb" in of_direction

    def test_wrong_weights_are_problems(self):
        trainings = (
            Compared("float32", 1e-3, 2e-5),
            Compared("float64", float("nan"), 1e-12),
            Compared("bfloat16", 1e-3, 5e-2, (1, 3)),
        )
        found = texts(result(1, 1, trainings=trainings, sums_are_exact=False))
        assert [text.split(":")[:2] for text in found[:3]] == [
            ["problem", " float32"],
            ["problem", " float64"],
            ["problem", " bfloat16"],
        ]
        assert "worker 1 and worker 3 and worker 0 have different weights" in found[2]
        assert "sum of integers" in found[3]


@quick
def test_the_distance_of_weights_is_relative_and_never_hides_a_nan():
    reference = {"a": np.array([2.0, -4.0]), "b": np.zeros(2)}
    assert distance({"a": np.array([2.0, -3.0]), "b": np.zeros(2)}, reference) == 0.25
    assert distance({"a": np.array([2.0, np.nan]), "b": np.zeros(2)}, reference) == np.inf
    assert distance({"a": reference["a"]}, reference) == np.inf
    assert distance({"a": reference["a"], "b": np.zeros(1)}, reference) == np.inf


def two_launchers(slots: int = 1) -> list[Peers]:
    """One machine that has two names, so that each launcher listens at its own ports."""
    hosts = [Host("127.0.0.1"), Host("localhost", slots)]
    port = free_port()
    return [peers_of_hosts(hosts, rank, port) for rank in range(2)]


@quick
class TestConnections:
    def test_launchers_reach_each_other(self):
        with ThreadPoolExecutor() as pool:
            found = pool.map(lambda p: reach.blockages(p, 30, "python 3"), two_launchers(2))
            assert list(found) == [[], []]

    def test_another_version_is_told_on_both_hosts(self):
        with ThreadPoolExecutor() as pool:
            asked = [
                pool.submit(reach.blockages, peers, 30, f"keras 3.{i}")
                for i, peers in enumerate(two_launchers())
            ]
            for future in asked:
                with pytest.raises(LaunchError, match=r"same versions.*keras 3\.[01]"):
                    future.result()

    def test_a_host_that_does_not_come_is_named(self):
        here, _ = two_launchers()
        (blockage,) = reach.blockages(here, 1.5, "")
        port = here.tasks[1].port
        assert blockage.describe() == (
            f"127.0.0.1 does not reach worker 1 at localhost:{port} (Connection refused). "
            "Nothing listens there: start the same command on localhost, and see what it "
            "prints."
        )

    def test_a_port_that_does_not_answer_is_named_if_the_host_is_there(self, monkeypatch):
        monkeypatch.setattr(reach, "_LATE_S", 1.0)
        here, there = two_launchers(2)
        # The other launcher listens at one of its two ports only.
        reachable = Peers(there.tasks[:2], ((0,), (1,)), 1)
        began = time.monotonic()
        with ThreadPoolExecutor() as pool:
            other = pool.submit(_greet, reachable, there)
            (blockage,) = reach.blockages(here, 90, "")
            other.result()
        assert time.monotonic() - began < 60
        port = here.tasks[2].port
        assert "worker 2 at localhost" in blockage.describe()
        assert f"let TCP connections from 127.0.0.1 to port {port} of localhost through" in (
            blockage.describe()
        )

    def test_a_link_is_measured_though_a_stranger_came_first(self):
        port = free_port()
        with ThreadPoolExecutor() as pool:
            served = pool.submit(serve, port, 30)
            deadline = time.monotonic() + 10
            while True:
                try:
                    with socket.create_connection(("127.0.0.1", port), 1) as stranger:
                        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
                    break
                except OSError:
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
            link = measure("a", "127.0.0.1", port)
            assert served.result()
        assert 0 < link.latency_s < 1
        assert min(link.to_bytes_per_s, link.from_bytes_per_s) == link.bytes_per_s > 1e6


def _greet(reachable: Peers, there: Peers) -> None:
    """Listens at one port for a moment, and greets as the launcher of `there`."""
    from tfdist.cluster.greetings import Greeting
    from tfdist.cluster.rendezvous import try_to_connect

    line = Greeting(there.here[0], tuple(t.address for t in there.tasks), "").line()
    with socket.create_server(("127.0.0.1", reachable.tasks[1].port)) as listener:
        listener.settimeout(10)
        deadline = time.monotonic() + 10
        while try_to_connect(there.tasks[0].address, line) is not None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        listener.accept()[0].close()


def report_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=LIMIT_S)
    assert out, err
    report: dict[str, Any] = json.loads(out)
    return {"status": process.returncode, "said": err, **report}


@pytest.fixture
def environ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    cache = {"TFDIST_CACHE_DIR": str(tmp_path / "cache")}
    monkeypatch.setenv(*next(iter(cache.items())))
    return {**QUIET, **cache}


def start(environ: dict[str, str], *options: str, within: tuple[str, ...] = ()) -> Any:
    return subprocess.Popen(
        [*within, *COMMAND, "--json", "--seconds", "1", *options],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def hold_up(process: subprocess.Popen[str], index: int) -> None:
    """Stops a worker for three quarters of the time, from when speeds are measured on."""
    assert process.stderr is not None
    for line in process.stderr:
        if "Times of collectives" in line:
            break
    (worker,) = [
        child
        for child in psutil.Process(process.pid).children()
        if child.status() != psutil.STATUS_ZOMBIE
        and "tfdist.scripts.worker_main" in child.cmdline()
        and json.loads(child.environ()["TF_CONFIG"])["task"]["index"] == index
    ]
    try:
        while process.poll() is None:
            worker.send_signal(signal.SIGSTOP)
            time.sleep(0.15)
            worker.send_signal(signal.SIGCONT)
            time.sleep(0.05)
    except psutil.NoSuchProcess:
        return


def check(report: dict[str, Any], strategy: str, workers: int, trainings: int) -> None:
    assert report["status"] == 0, report["said"]
    assert report["works"], report["problems"]
    assert report["result"]["strategy"] == strategy
    assert len(report["result"]["trainings"]) == trainings
    assert len(report["result"]["speeds"]) == workers
    for operation in report["lines"]:
        timings = [t for t in report["result"]["timings"] if t["operation"] == operation]
        # A slow machine leaves out the largest sizes.
        sizes = [1 << bits for bits in range(10, 21, 2)][: max(2, len(timings))]
        assert [timing["size"] for timing in timings] == sizes
        assert all(timing["seconds"] > 0 for timing in timings)


@pytest.mark.cluster
@pytest.mark.timeout(900)
class TestRuns:
    @pytest.mark.full
    def test_a_slow_worker_is_found_and_the_times_are_kept(self, environ):
        process = start(environ, "-n", "2")
        hold_up(process, 1)
        report = report_of(process)
        check(report, "multi_worker", 2, 4)
        told = [verdict["text"] for verdict in report["verdicts"]]
        assert any("worker 1 (on" in t and "times slower than worker 0" in t for t in told), (
            told
        )
        (kept,) = kept_links.read()
        assert (kept.strategy, kept.workers, kept.hosts) == ("multi_worker", 2, 1)
        line = report["lines"][ALL_REDUCE]
        assert kept.seconds(1e6) == Line(**line).seconds(1e6)

    @pytest.mark.full
    @pytest.mark.parametrize(
        ("options", "strategy", "trainings", "speeds"),
        [
            ("-n 2 --strategy horovod", "horovod", 4, 2),
            ("-n 2 --ps 1", "parameter_server", 1, 2),
            ("-n 2 --ps 2 --synchronous", "parameter_server", 4, 2),
        ],
    )
    def test_other_strategies_work(self, environ, options, strategy, trainings, speeds):
        report = report_of(start(environ, *options.split()))
        check(report, strategy, speeds, trainings)

    @pytest.mark.full
    def test_one_process_is_tested_too(self, environ):
        report = report_of(start(environ, "--strategy", "mirrored"))
        assert report["works"], report["problems"]
        assert len(report["result"]["trainings"]) == 4
        assert kept_links.read() == []  # there is no collective


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=20)


@pytest.fixture
def nodes() -> Iterator[list[str]]:
    """Two network namespaces, 10.79.0.1 and 10.79.0.2, joined by a cable."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root, and the program `ip` (package iproute2)")
    names = [f"tfds{os.getpid() % 100000}-{i}" for i in range(2)]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ends = [("name", "eth0", "netns", name) for name in names]
            ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
            for i, name in enumerate(names, 1):
                ip("-n", name, "addr", "add", f"10.79.0.{i}/24", "dev", "eth0")
                ip("-n", name, "link", "set", "eth0", "up")
                ip("-n", name, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def on_both(nodes: list[str], environ: dict[str, str], hosts: str) -> list[dict[str, Any]]:
    processes = [
        start(
            environ,
            *("--hosts", hosts, "--node-rank", str(rank)),
            within=("ip", "netns", "exec", name),
        )
        for rank, name in enumerate(nodes)
    ]
    with ThreadPoolExecutor() as pool:
        return list(pool.map(report_of, processes))


@pytest.mark.full
@pytest.mark.cluster
@pytest.mark.timeout(900)
class TestHosts:
    def test_a_blocked_port_is_named_on_both_hosts(self, nodes, environ):
        port = 17382  # of worker 2: its answers are dropped, as by a firewall
        ip(*f"-n {nodes[1]} rule add pref 1 ipproto tcp sport {port} blackhole".split())
        first, second = on_both(nodes, environ, "10.79.0.1:1,10.79.0.2:2")
        for report in (first, second):
            assert report["status"] == 1
            (problem,) = report["problems"]
            assert f"10.79.0.1 does not reach worker 2 at 10.79.0.2:{port}" in problem
            remedy = f"et TCP connections from 10.79.0.1 to port {port} of 10.79.0.2 through"
            assert remedy in problem
        assert kept_links.read() == []

    def test_a_slow_link_is_measured_in_its_direction(self, nodes, environ):
        if shutil.which("tc") is None:
            pytest.skip("a slow link needs the program `tc` (package iproute2)")
        tbf = "tc qdisc add dev eth0 root tbf rate 100mbit burst 64kb latency 50ms"
        subprocess.run(
            ["ip", "netns", "exec", nodes[0], *tbf.split()], check=True, capture_output=True
        )
        report, other = on_both(nodes, environ, "10.79.0.1:1,10.79.0.2:1")
        check(report, "multi_worker", 2, 4)
        assert (other["status"], other["result"]) == (0, None)
        (link,) = report["links"]
        assert 8 * link["to_bytes_per_s"] == pytest.approx(1e8, rel=0.2)
        told = [verdict["text"] for verdict in report["verdicts"]]
        assert any("from 10.79.0.1 to 10.79.0.2 carries" in text for text in told), told
        (kept,) = kept_links.read()
        assert kept.hosts == 2
        assert 8 * kept.bytes_per_s < 1.3e8
