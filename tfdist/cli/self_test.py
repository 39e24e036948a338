"""`tfdist test`: whether this machine or cluster trains as one process does, and how fast."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TextIO

import click

from tfdist._version import __version__
from tfdist.cli.explanation import explain
from tfdist.cli.run import run
from tfdist.cli.run_options import check_synchronous
from tfdist.cluster import Cluster
from tfdist.cluster.rendezvous import start_timeout
from tfdist.launch import (
    NODE_TIMEOUT_S,
    Host,
    Outcome,
    Roster,
    Shows,
    Worker,
    check_names,
    exposed_ports,
    open_standard_streams,
    parse_hosts,
    run_workers,
    script_command,
    share_token,
)
from tfdist.launch.resources import usable_cores, visible_gpus
from tfdist.launch.self_test.link import HostLink, links
from tfdist.launch.self_test.peers import Peers, peers_of_cluster, peers_of_hosts
from tfdist.launch.self_test.reach import blockages
from tfdist.launch.self_test.report import SelfTestReport, judged
from tfdist.launch.self_test.result import Result

_MODULE = "tfdist.scripts.self_test"
_LARGEST_MIB = 64
_AS_RUN = (
    "workers", "servers", "synchronous", "hosts", "node_rank", "port", "strategy", "output",
)  # fmt: skip
# The training in one process must not see that there is a cluster.
_OF_A_CLUSTER = ("TF_CONFIG", "TFDIST_", "HOROVOD_", "SLURM_", "OMPI_", "PMI_")


@click.command("test")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=10.0,
    show_default=True,
    help="About how long to measure collectives. Large tensors are left out on slow links.",
)
@click.option(
    "--largest",
    type=click.IntRange(min=1, max=1024),
    default=_LARGEST_MIB,
    show_default=True,
    metavar="MIB",
    help="The largest tensor to measure.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def self_test(
    workers: int | None,
    servers: int,
    synchronous: bool,
    hosts: str | None,
    node_rank: int | None,
    port: int,
    strategy: str | None,
    output: Shows,
    seconds: float,
    largest: int,
    as_json: bool,
) -> None:
    """Test whether training works here, and measure its parts.

    The workers are started as `tfdist run` starts them, with the same options, on all hosts.
    They try all connections, compare small trainings with one process, and measure how fast
    each worker computes and how long collectives take. `tfdist recommend` uses what was
    measured.

    \b
    Examples:
      tfdist test -n 2
      tfdist test --hosts node1:4,node2:4 --node-rank 0    on node1
      tfdist test --hosts node1:4,node2:4 --node-rank 1    on node2
      srun tfdist test

    Exit status: 0 if it works, else 1; 2 for a wrong command line.
    """  # noqa: D301
    open_standard_streams()
    check_synchronous(synchronous, servers)
    if synchronous:
        os.environ["TFDIST_SYNCHRONOUS"] = "1"  # the workers inherit it
    machines = parse_hosts(hosts) if hosts is not None else ()
    if strategy == "horovod":
        share_token(machines, node_rank, NODE_TIMEOUT_S)  # for the secret of its ranks
    with tempfile.TemporaryDirectory(prefix="tfdist-test-") as name:
        folder = Path(name)
        roster = Roster(
            _command(folder, seconds, largest, workers or sum(m.slots for m in machines)),
            workers=workers,
            hosts=machines,
            node_rank=node_rank,
            elastic=None,
            port=port,
            strategy=strategy,
            servers=servers,
        )
        check_names(machines)
        peers = _peers(roster.workers, machines, node_rank or 0, port, servers)
        stream = sys.stderr if as_json else sys.stdout
        report = _test(roster, peers, folder, stream, shows=output)
    _keep(report)
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=2))
    else:
        _print(report, any(map(_is_chief, roster.workers)), machines)
    sys.exit(0 if report.works else 1)


self_test.params = [o for o in run.params if o.name in _AS_RUN] + self_test.params


def _print(report: SelfTestReport, has_chief: bool, machines: Sequence[Host]) -> None:
    """Prints the report where the chief is; on other hosts only what does not work."""
    # Few commands need the library that draws tables.
    from tfdist.launch.self_test.page import show

    if has_chief or not report.works:
        show(report)
    elif machines:
        click.echo(f"tfdist test: works. The report is on {machines[0].name}.")


def _command(folder: Path, seconds: float, largest: int, workers: int) -> Sequence[str]:
    arguments = {
        "--result": folder / "result.json",
        "--reference": folder / "reference.pickle",
        "--reference-limit": start_timeout(),
        "--seconds": seconds,
        "--largest": largest << 20,
        "--workers": workers,
    }
    listed = [str(text) for pair in arguments.items() for text in pair]
    return script_command((_MODULE, *listed), module=True)


def _peers(
    workers: Sequence[Worker], hosts: Sequence[Host], node_rank: int, port: int, servers: int
) -> Peers | None:
    """Returns the processes of the run; None if this launcher starts all of them."""
    if len(hosts) > 1:
        return peers_of_hosts(hosts, node_rank, port, servers)
    return peers_of_cluster(workers[0]) if len(workers) == 1 and not hosts else None


def _test(
    roster: Roster, peers: Peers | None, folder: Path, stream: TextIO, shows: Shows
) -> SelfTestReport:
    """Tries the connections, starts the workers, and gathers what they find."""
    hosts = () if peers is None else peers.hosts
    measured: list[HostLink] = []
    unmeasured: list[str] = []
    if peers is not None:
        _say(f"This host tries the connections between {len(peers.tasks)} processes.")
        blocked = blockages(peers, start_timeout(), _versions())
        if blocked:
            return SelfTestReport(hosts, tuple(blocked))
        measured, unmeasured = links(peers)
    if exposed := exposed_ports(roster.workers):
        click.echo(exposed, err=True)
    has_chief = any(map(_is_chief, roster.workers))
    with _one_process(folder / "reference.pickle") if has_chief else contextlib.nullcontext():
        outcome = run_workers(
            roster.workers,
            stream=stream,
            meeting=roster.meeting,
            shows=shows,
        )
    explain(outcome, roster.workers, None, has_other_hosts=len(hosts) > 1)
    return _found(outcome, folder / "result.json", hosts, measured, unmeasured)


def _found(
    outcome: Outcome,
    file: Path,
    hosts: Sequence[str],
    measured: Sequence[HostLink],
    unmeasured: Sequence[str],
) -> SelfTestReport:
    if outcome.status:
        what = outcome.what or f"The workers ended with exit status {outcome.status}."
        return SelfTestReport(tuple(hosts), (), tuple(measured), failure=what)
    if not file.exists():  # the chief is on another host
        return SelfTestReport(tuple(hosts), (), tuple(measured))
    return judged(Result.read(file), hosts, measured, unmeasured, usable_cores())


@contextlib.contextmanager
def _one_process(target: Path) -> Iterator[None]:
    """Trains in one process beside the workers; before them if they need its GPU."""
    environ = {
        name: value for name, value in os.environ.items() if not name.startswith(_OF_A_CLUSTER)
    }
    environ = {"TF_CPP_MIN_LOG_LEVEL": "2", **environ}
    process = subprocess.Popen(
        [sys.executable, "-m", f"{_MODULE}.one_process", str(target)],
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        if visible_gpus(os.environ):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(start_timeout())
        yield
    finally:
        process.kill()
        process.wait()


def _keep(report: SelfTestReport) -> None:
    """Keeps what was measured for `tfdist recommend`."""
    from tfdist.cluster.links import record

    measurement = report.measurement()
    if measurement is None:
        return
    try:
        record(measurement)
    except OSError as error:
        _say(f"The measurement is not kept for `tfdist recommend`: {error}.")


def _is_chief(worker: Worker) -> bool:
    cluster = Cluster.from_environment(worker.environment)
    return not worker.serves and cluster.is_chief


def _versions() -> str:
    listed = [
        f"python {sys.version_info.major}.{sys.version_info.minor}",
        f"tfdist {__version__}",
    ]
    for package in ("tensorflow", "keras", "horovod"):
        with contextlib.suppress(PackageNotFoundError):
            listed.append(f"{package} {version(package)}")
    return ", ".join(listed)


def _say(line: str) -> None:
    click.echo(f"tfdist test: {line}", err=True)
