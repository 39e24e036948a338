"""Plans the worker processes that this machine starts, from the options of `tfdist run`."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from tfdist.cluster import CHIEF, PS, WORKER, Cluster
from tfdist.launch.existing_cluster import check_strategy, variables
from tfdist.launch.extent import check_alone, check_ports, check_request, extent, label
from tfdist.launch.horovod import one_host, rank_environments, secret_for
from tfdist.launch.hosts import Host, check_names, worker_addresses
from tfdist.launch.resources import gpu_environments, thread_environment, visible_gpus
from tfdist.launch.worker import Worker

DEFAULT_PORT = 17380

_GPUS = "CUDA_VISIBLE_DEVICES"
# TensorFlow's messages at its start would bury the workers' own output; its errors stay.
_QUIET = {"TF_CPP_MIN_LOG_LEVEL": "2", "GRPC_VERBOSITY": "ERROR"}


def plan_workers(
    command: Sequence[str],
    *,
    workers: int | None = None,
    hosts: Sequence[Host] = (),
    node_rank: int | None = None,
    port: int = DEFAULT_PORT,
    strategy: str | None = None,
    drop_in: bool = False,
    servers: int = 0,
    environ: Mapping[str, str] = os.environ,
) -> tuple[Worker, ...]:
    """Decides which workers this machine starts, and each one's environment.

    If the environment describes a cluster, one process is started, which takes its place
    there.

    Args:
        command: The program each worker runs, and its arguments.
        workers: Workers in all; by default the sum of the hosts' slots, or 1 without hosts.
        hosts: The machines, in the same order on each of them; empty if there is only this
            one.
        node_rank: This machine's position in `hosts`.
        port: The port of worker 0, if there are several hosts; worker k has `port + k`.
        strategy: The strategy's name, handed to the workers.
        drop_in: Whether Keras's own `fit` is to be distributed.
        servers: Parameter servers in all. With servers there is also a chief, and only the
            chief runs the command's script.
        environ: The variables that the workers inherit.

    Returns:
        The workers to start here.

    Raises:
        ClusterError: With Horovod, a host's name does not resolve in time.
        LaunchError: The arguments contradict each other or the environment, or a port that
            a worker needs is in use.
    """
    total, first, local = extent(workers, hosts, node_rank)
    existing = Cluster() if hosts else Cluster.from_environment(environ)
    check_request(strategy, total, servers, existing)
    if total > 1 or servers:
        check_alone(total, existing)
    gpus = visible_gpus(environ) if local > 1 else ()
    gpu_variables = gpu_environments(gpus, local)
    places: Sequence[Mapping[str, str]]
    other_tasks: list[Cluster]
    is_joined = (
        not servers and total == 1 and (existing.num_workers > 1 or existing.job != WORKER)
    )
    if is_joined:
        check_strategy(existing, strategy)
        places, other_tasks = [variables(existing, strategy)], []
    else:
        local_workers = range(first, first + local)
        places, other_tasks = _places(
            hosts, node_rank or 0, total, local_workers, servers, port, strategy, environ
        )

    shared = _shared_environment(local, None if is_joined else strategy, drop_in, environ)
    is_quiet = _hides_start_up(environ)
    all_workers: list[Worker] = []
    for cluster in other_tasks:
        # The chief and the servers leave the GPUs to the workers.
        environment = {**shared, "TF_CONFIG": cluster.to_tf_config(), _GPUS: "-1"}
        serves = cluster.job != CHIEF
        all_workers.append(
            Worker(cluster.index, tuple(command), environment, is_quiet, cluster.job, serves)
        )
    for local_rank in range(local):
        index = first + local_rank
        environment = {
            **shared,
            **gpu_variables[local_rank],
            **places[index],
            "TFDIST_LOCAL_RANK": str(local_rank),
            "TFDIST_LOCAL_SIZE": str(local),
        }
        job = WORKER
        if is_joined:
            index, job = label(existing)
        all_workers.append(
            Worker(index, tuple(command), environment, is_quiet, job, serves=bool(servers))
        )
    return tuple(all_workers)


def _hides_start_up(environ: Mapping[str, str]) -> bool:
    """Returns whether to hide TensorFlow's start-up messages: unless 0 or 1 asks for them."""
    level = environ.get("TF_CPP_MIN_LOG_LEVEL", "")
    return level.strip() not in ("0", "1")


def _places(
    hosts: Sequence[Host],
    node_rank: int,
    total: int,
    local_workers: range,
    servers: int,
    port: int,
    strategy: str | None,
    environ: Mapping[str, str],
) -> tuple[Sequence[Mapping[str, str]], list[Cluster]]:
    """Returns the environment variables that tell each worker of the run its place.

    Besides, it returns the places of the chief and the servers on this machine.
    """
    clusters: Sequence[Cluster]
    other_tasks: list[Cluster] = []
    if servers:
        clusters, other_tasks = _clusters_with_servers(
            hosts, node_rank, total, servers, port, local_workers
        )
    elif strategy == "horovod":
        check_names(hosts)
        address = f"{hosts[0].name}:{port}" if hosts else free_addresses(1)[0]
        secret = secret_for(environ, is_alone=len(hosts) < 2)
        return rank_environments(hosts or one_host(total), node_rank, address, secret), []
    elif total > 1:
        addresses = worker_addresses(hosts, port) if hosts else free_addresses(total)
        if hosts:
            check_ports(addresses[local_workers.start : local_workers.stop])
        clusters = [Cluster({WORKER: addresses}, WORKER, i, "TF_CONFIG") for i in range(total)]
    else:
        return [{}], []
    return [{"TF_CONFIG": cluster.to_tf_config()} for cluster in clusters], other_tasks


def _clusters_with_servers(
    hosts: Sequence[Host],
    node_rank: int,
    workers: int,
    servers: int,
    port: int,
    local_workers: range,
) -> tuple[list[Cluster], list[Cluster]]:
    """Returns the places of all workers, and of the chief and the servers on this machine."""
    clusters = server_clusters(hosts, workers, servers, port)
    worker_places = [c for c in clusters if c.job == WORKER]
    # Chief and servers are distributed over the hosts in turn.
    other_tasks = [
        c for c in clusters if c.job != WORKER and c.index % max(1, len(hosts)) == node_rank
    ]
    if hosts:
        local_tasks = [*other_tasks, *(worker_places[i] for i in local_workers)]
        check_ports([c.jobs[c.job][c.index] for c in local_tasks])
    return worker_places, other_tasks


def _shared_environment(
    local_workers: int, strategy: str | None, drop_in: bool, environ: Mapping[str, str]
) -> dict[str, str]:
    """Returns the environment variables that all workers of this machine share."""
    shared = {
        **_QUIET,
        **environ,
        **thread_environment(local_workers, environ),
        "PYTHONUNBUFFERED": "1",
    }
    if strategy is not None:
        shared["TFDIST_STRATEGY"] = strategy
    if drop_in:
        shared["TFDIST_DROP_IN"] = "1"
    return shared


def count_on_processor(workers: Sequence[Worker]) -> int:
    """Returns how many of this machine's workers compute without a GPU of their own.

    Args:
        workers: The workers that this machine starts.
    """
    on_processor = ("", "-1")
    return sum(
        worker.job == WORKER and worker.environment.get(_GPUS, "") in on_processor
        for worker in workers
    )


def server_clusters(
    hosts: Sequence[Host], workers: int, servers: int, port: int
) -> tuple[Cluster, ...]:
    """Gives every process of a run with parameter servers its place.

    The chief runs on the first host. Servers are distributed over the hosts in turn. The
    chief has the port after the last worker's port, and the servers have the ports after it.

    Args:
        hosts: The machines; empty if there is only this one.
        workers: Workers in all.
        servers: Parameter servers in all.
        port: The port of worker 0, if there are hosts.

    Returns:
        The places of the chief, the servers and the workers, in this order.
    """
    if hosts:
        chief_port = port + workers
        addresses = worker_addresses(hosts, port)
        chief = f"{hosts[0].name}:{chief_port}"
        server_addresses = tuple(
            f"{hosts[i % len(hosts)].name}:{chief_port + 1 + i}" for i in range(servers)
        )
    else:
        chief, *rest = free_addresses(1 + servers + workers)
        server_addresses, addresses = tuple(rest[:servers]), tuple(rest[servers:])
    jobs = {CHIEF: (chief,), WORKER: addresses, PS: server_addresses}
    tasks = [(job, index) for job in (CHIEF, PS, WORKER) for index in range(len(jobs[job]))]
    return tuple(Cluster(jobs, job, index, "TF_CONFIG") for job, index in tasks)


def free_addresses(count: int) -> tuple[str, ...]:
    """Finds ports of this machine on which nothing listens.

    Args:
        count: How many ports.

    Returns:
        Addresses `"127.0.0.1:port"`, all different.
    """
    with ExitStack() as stack:
        # All ports stay bound until the last one is found: otherwise one could come twice.
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return tuple(f"127.0.0.1:{probe.getsockname()[1]}" for probe in sockets)
