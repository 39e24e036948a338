"""Which ports of a run listen on all interfaces of this machine: one line for the user."""

from __future__ import annotations

from collections.abc import Sequence

from tfdist.cluster import Cluster
from tfdist.errors import ClusterError
from tfdist.launch.worker import Worker


def exposed_ports(workers: Sequence[Worker], coordinator_port: int | None = None) -> str:
    """Returns a line that names the ports; empty if there are none.

    TensorFlow's servers listen on all interfaces, also where their addresses are 127.0.0.1.
    Horovod's ranks and their server listen on one.

    Args:
        workers: The workers that this machine starts.
        coordinator_port: The port at which the launchers of several machines meet, if it is
            here.
    """
    ports = sorted({port for worker in workers for port in _ports(worker)})
    of_tensorflow = [f"{_listed(ports)} (TensorFlow)"] if ports else []
    of_launchers = [] if coordinator_port is None else [f"{coordinator_port} (the launchers)"]
    parts = of_launchers + of_tensorflow
    if not parts:
        return ""
    word = "ports" if len(ports) + len(of_launchers) > 1 else "port"
    return (
        f"tfdist: {word} {' and '.join(parts)} of this machine can be reached from other "
        "machines, unless a firewall forbids it."
    )


def _ports(worker: Worker) -> list[int]:
    try:
        cluster = Cluster.from_environment(worker.environment)
    except ClusterError:
        return []  # the worker itself will say so
    addresses = cluster.jobs.get(cluster.job, ())
    if cluster.num_workers == 1 and not cluster.has_parameter_servers:
        return []
    return [int(addresses[cluster.index].rpartition(":")[2])] if addresses else []


def _listed(ports: Sequence[int]) -> str:
    """Lists ports; of a row of them the first and the last."""
    if len(ports) > 2 and ports[-1] - ports[0] == len(ports) - 1:
        return f"{ports[0]}-{ports[-1]}"
    return ", ".join(map(str, ports))
