"""From what the user asked for to the worker processes that this machine starts."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from tfdist.cluster import CHIEF, EVALUATOR, PS, WORKER, Cluster, strategy_names
from tfdist.errors import LaunchError
from tfdist.launch.existing_cluster import ONE_PROCESS_STRATEGIES, check_strategy, variables
from tfdist.launch.horovod import one_host, rank_environments
from tfdist.launch.hosts import Host, worker_addresses
from tfdist.launch.resources import gpu_environments, thread_environment, visible_gpus

DEFAULT_PORT = 17380
_MOST_WORKERS = 65535

# TensorFlow's start-up notes would bury what the workers print; its errors stay.
_GPUS = "CUDA_VISIBLE_DEVICES"
_QUIET = {"TF_CPP_MIN_LOG_LEVEL": "2", "GRPC_VERBOSITY": "ERROR"}


@dataclass(frozen=True)
class Worker:
    """A process to be started on this machine: a worker, or a task beside the workers.

    Attributes:
        index: Its position in its job, on all machines.
        command: The program and its arguments.
        environment: All of its environment variables.
        is_quiet: Whether TensorFlow's notes about its own start are left out of what is
            shown; a log file has them all the same.
        job: `worker`, in a run with parameter servers `chief`, `worker` or `ps`, and in a
            cluster that was there before also `evaluator`.
        serves: Whether it only does what the chief asks for: it ends with the chief.
    """

    index: int
    command: tuple[str, ...]
    environment: Mapping[str, str]
    is_quiet: bool = False
    job: str = WORKER
    serves: bool = False

    @property
    def task(self) -> str:
        """Its name in messages, such as `"worker 1"` or `"chief"`."""
        return CHIEF if self.job == CHIEF else f"{self.job} {self.index}"

    @property
    def log_name(self) -> str:
        """The name of the file that `--log-dir` keeps its output in."""
        return f"{self.task.replace(' ', '-')}.log"

    @property
    def is_replaceable(self) -> bool:
        """Whether the others go on without it until it is back."""
        return self.serves and self.job == WORKER

    @property
    def shows_progress(self) -> bool:
        """Whether it is the one that draws a progress bar."""
        return self.index == 0 and not self.serves


def script_command(arguments: Sequence[str], module: bool = False) -> tuple[str, ...]:
    """Returns the command that runs a user's script inside a worker.

    Args:
        arguments: The script and its arguments.
        module: Whether the first is the name of a module, as after `python -m`.
    """
    return (
        sys.executable,
        "-m",
        "tfdist.scripts.worker_main",
        *(("-m",) if module else ()),
        *arguments,
    )


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

    One process in an environment that describes a cluster takes its place there.

    Args:
        command: The program each worker runs, and its arguments.
        workers: How many workers in all; the sum of the hosts' slots unless given, else 1.
        hosts: The machines, in the same order on each of them; empty for this one alone.
        node_rank: This machine's position in `hosts`.
        port: The port of worker 0, where there are several hosts; worker k has `port + k`.
        strategy: The strategy's name, handed to the workers.
        drop_in: Whether Keras's own `fit` is to be distributed.
        servers: How many parameter servers in all; with some there is a chief beside the
            workers, which alone runs the command's script.
        environ: The variables that the workers inherit.

    Returns:
        The workers to start here.

    Raises:
        LaunchError: The arguments contradict each other or the environment, or a port that
            a worker needs is in use.
    """
    total, first, local = _extent(workers, hosts, node_rank)
    given = Cluster() if hosts else Cluster.from_environment(environ)
    _check_strategy(strategy, total, servers, given)
    if total > 1 or servers:
        _check_alone(total, given)
    gpus = visible_gpus(environ) if local > 1 else ()
    gpu_shares = gpu_environments(gpus, local)
    places: Sequence[Mapping[str, str]]
    beside: list[Cluster] = []
    is_joined = not servers and total == 1 and (given.num_workers > 1 or given.job != WORKER)
    if is_joined:
        check_strategy(given, strategy)
        places = [variables(given, strategy)]
    elif servers:
        everyone = server_clusters(hosts, total, servers, port)
        workers_of_all = [c for c in everyone if c.job == WORKER]
        beside = [
            c
            for c in everyone
            if c.job != WORKER and c.index % max(1, len(hosts)) == (node_rank or 0)
        ]
        if hosts:
            here = [*beside, *workers_of_all[first : first + local]]
            _check_ports([c.jobs[c.job][c.index] for c in here])
        places = [{"TF_CONFIG": c.to_tf_config()} for c in workers_of_all]
    elif strategy == "horovod":
        address = f"{hosts[0].name}:{port}" if hosts else free_addresses(1)[0]
        places = rank_environments(hosts or one_host(total), node_rank or 0, address)
    elif total > 1:
        addresses = worker_addresses(hosts, port) if hosts else free_addresses(total)
        if hosts:
            _check_ports(addresses[first : first + local])
        clusters = [Cluster({WORKER: addresses}, WORKER, i, "TF_CONFIG") for i in range(total)]
        places = [{"TF_CONFIG": cluster.to_tf_config()} for cluster in clusters]
    else:
        places = [{}]

    shared = {
        **_QUIET,
        **environ,
        **thread_environment(local, environ),
        "PYTHONUNBUFFERED": "1",
    }
    if strategy is not None and not is_joined:
        shared["TFDIST_STRATEGY"] = strategy
    if drop_in:
        shared["TFDIST_DROP_IN"] = "1"
    is_quiet = "TF_CPP_MIN_LOG_LEVEL" not in environ
    planned: list[Worker] = []
    for cluster in beside:
        # They leave the GPUs to the workers.
        environment = {**shared, "TF_CONFIG": cluster.to_tf_config(), _GPUS: "-1"}
        serves = cluster.job != CHIEF
        planned.append(
            Worker(cluster.index, tuple(command), environment, is_quiet, cluster.job, serves)
        )
    for local_rank in range(local):
        index = first + local_rank
        environment = {
            **shared,
            **gpu_shares[local_rank],
            **places[index],
            "TFDIST_LOCAL_RANK": str(local_rank),
            "TFDIST_LOCAL_SIZE": str(local),
        }
        job = WORKER
        if is_joined:
            index, job = _label(given)
        planned.append(
            Worker(index, tuple(command), environment, is_quiet, job, serves=bool(servers))
        )
    return tuple(planned)


def server_clusters(
    hosts: Sequence[Host], workers: int, servers: int, port: int
) -> tuple[Cluster, ...]:
    """Gives every process of a run with parameter servers its place.

    The chief is on the first host, servers go to the hosts in turn. The chief has the port
    after the last worker's, the servers those after it.

    Args:
        hosts: The machines; empty for this one alone.
        workers: How many workers in all.
        servers: How many parameter servers in all.
        port: The port of worker 0, where there are hosts.

    Returns:
        The places of the chief, the servers and the workers, in this order.
    """
    if hosts:
        after = port + workers
        addresses = worker_addresses(hosts, port)
        chief = f"{hosts[0].name}:{after}"
        served = tuple(f"{hosts[i % len(hosts)].name}:{after + 1 + i}" for i in range(servers))
    else:
        chief, *rest = free_addresses(1 + servers + workers)
        served, addresses = tuple(rest[:servers]), tuple(rest[servers:])
    jobs = {CHIEF: (chief,), WORKER: addresses, PS: served}
    tasks = [(job, index) for job in (CHIEF, PS, WORKER) for index in range(len(jobs[job]))]
    return tuple(Cluster(jobs, job, index, "TF_CONFIG") for job, index in tasks)


def free_addresses(count: int) -> tuple[str, ...]:
    """Finds ports of this machine that nobody listens on.

    Args:
        count: How many.

    Returns:
        Addresses `"127.0.0.1:port"`, all different.
    """
    with ExitStack() as held:
        # All are held until the last is found, or the same port could come twice.
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return tuple(f"127.0.0.1:{one.getsockname()[1]}" for one in sockets)


def _extent(
    workers: int | None, hosts: Sequence[Host], node_rank: int | None
) -> tuple[int, int, int]:
    """Returns how many workers there are, the first of this machine, and how many it starts."""
    if workers is not None and workers < 1:
        raise LaunchError(
            "The number of workers must be 1 or more. "
            f"Received: -n {workers}. Leave -n out to start one."
        )
    if not hosts:
        if node_rank is not None:
            raise LaunchError(
                "`--node-rank` must come with --hosts, whose entries it counts. "
                f"Received: --node-rank={node_rank} without --hosts. "
                "Add --hosts, or leave --node-rank out to train on this machine alone."
            )
        return _countable(workers or 1), 0, workers or 1
    total = _countable(sum(host.slots for host in hosts))
    if workers is not None and workers != total:
        raise LaunchError(
            "`-n` must equal the sum of the slots in --hosts. "
            f"Received: -n {workers}, --hosts with {total} slots. "
            "Leave -n out, or change the slots."
        )
    if node_rank is None:
        if len(hosts) > 1:
            raise LaunchError(
                "`--node-rank` must say which of the hosts this machine is. "
                f"Received: --node-rank=None, with {len(hosts)} hosts. "
                f"Run the command on each host, with --node-rank 0 to {len(hosts) - 1}."
            )
        node_rank = 0
    if not 0 <= node_rank < len(hosts):
        raise LaunchError(
            f"`--node-rank` must be from 0 to {len(hosts) - 1}, as --hosts names "
            f"{len(hosts)}. Received: --node-rank={node_rank}. "
            "Count the hosts from 0, in the order of --hosts."
        )
    first = sum(host.slots for host in hosts[:node_rank])
    return total, first, hosts[node_rank].slots


def _countable(workers: int) -> int:
    """Gives the number of workers, each of which needs a port."""
    if workers > _MOST_WORKERS:
        raise LaunchError(
            f"There must be at most {_MOST_WORKERS} workers, as each has a port. Received: "
            f"{workers} workers. Lower -n, or the slots in --hosts."
        )
    return workers


def _label(given: Cluster) -> tuple[int, str]:
    """Gives the number and the job under which a process of a cluster is shown."""
    if given.job in (CHIEF, WORKER) and not given.has_parameter_servers:
        return given.worker_index, WORKER
    return given.index, given.job


def _check_strategy(strategy: str | None, total: int, servers: int, given: Cluster) -> None:
    choices = ["auto", *strategy_names.names()]
    if strategy is not None and strategy not in choices:
        raise LaunchError(
            f"`--strategy` must be one of {', '.join(choices)}. "
            f"Received: --strategy={strategy}. Choose one of these."
        )
    has_servers = servers or given.has_parameter_servers or given.job == EVALUATOR
    if servers < 0 or (strategy == "parameter_server" and not has_servers):
        raise LaunchError(
            "The number of parameter servers must be 1 or more. Received: "
            f"--ps={servers} with --strategy={strategy}. Add --ps 1, or more."
        )
    if servers and strategy not in (None, "auto", "parameter_server"):
        raise LaunchError(
            f"Strategy {strategy!r} has no parameter servers. Received: --ps={servers} with "
            f"--strategy={strategy}. Leave one of them out."
        )
    if total > 1 and strategy in ONE_PROCESS_STRATEGIES:
        raise LaunchError(
            f"Strategy {strategy!r} trains in one process. "
            f"Received: --strategy={strategy} with {total} workers. "
            "Start one worker, or use --strategy multi_worker or horovod."
        )


def _check_alone(total: int, given: Cluster) -> None:
    if given.num_workers > 1 or given.job != WORKER:
        raise LaunchError(
            "Several workers can be started only where no cluster is described yet. "
            f"Received: -n {total}, where {given.source} already makes this process "
            f"{given.task} of {given.num_workers}. Leave -n out to join that cluster, "
            "or unset TF_CONFIG and start outside of srun."
        )


def _check_ports(addresses: Sequence[str]) -> None:
    for address in addresses:
        port = int(address.rpartition(":")[2])
        with socket.socket() as probe:
            # As TensorFlow's server does: a port in TIME_WAIT can be used.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError as error:
                raise LaunchError(
                    "The port of each worker on this machine must be free. "
                    f"Received: port {port}, for {address} ({error.strerror}). "
                    "End the program that listens there, or choose another --port, "
                    "the same on every host."
                ) from None
