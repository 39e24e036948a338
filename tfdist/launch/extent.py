"""How many workers a run has, and whether they can be started here."""

from __future__ import annotations

from collections.abc import Sequence

from tfdist.cluster import CHIEF, EVALUATOR, WORKER, Cluster, strategy_names
from tfdist.cluster.listening import bound_everywhere
from tfdist.errors import LaunchError
from tfdist.launch.existing_cluster import ONE_PROCESS_STRATEGIES
from tfdist.launch.hosts import Host

_MOST_WORKERS = 65535


def extent(
    workers: int | None, hosts: Sequence[Host], node_rank: int | None
) -> tuple[int, int, int]:
    """Returns the workers in all, the first one of this machine, and how many it starts.

    Args:
        workers: The value of `-n`, or None.
        hosts: The machines.
        node_rank: This machine's position among them.
    """
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
        return _checked_count(workers or 1), 0, workers or 1
    total = _checked_count(sum(host.slots for host in hosts))
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


def _checked_count(workers: int) -> int:
    """Checks that there are enough ports for the workers, and returns their number."""
    if workers > _MOST_WORKERS:
        raise LaunchError(
            f"There must be at most {_MOST_WORKERS} workers, as each has a port. Received: "
            f"{workers} workers. Lower -n, or the slots in --hosts."
        )
    return workers


def label(existing: Cluster) -> tuple[int, str]:
    """Returns the number and the job under which a process of a cluster is shown.

    Args:
        existing: The cluster, with the process's place.
    """
    if existing.job in (CHIEF, WORKER) and not existing.has_parameter_servers:
        return existing.worker_index, WORKER
    return existing.index, existing.job


def check_request(strategy: str | None, total: int, servers: int, existing: Cluster) -> None:
    """Refuses a strategy that does not fit the numbers of workers and servers.

    Args:
        strategy: The value of `--strategy`.
        total: Workers in all.
        servers: Parameter servers in all.
        existing: The existing cluster.

    Raises:
        LaunchError: The arguments contradict each other.
    """
    choices = ["auto", *strategy_names.names()]
    if strategy is not None and strategy not in choices:
        raise LaunchError(
            f"`--strategy` must be one of {', '.join(choices)}. "
            f"Received: --strategy={strategy}. Choose one of these."
        )
    has_servers = servers or existing.has_parameter_servers or existing.job == EVALUATOR
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
    if strategy == "multi_worker" and total == 1 and _is_alone(existing):
        raise LaunchError(
            "Strategy 'multi_worker' trains in several processes. "
            f"Received: --strategy={strategy} with 1 worker, and no TF_CONFIG that describes "
            "more. Add -n 2, or leave --strategy out to train in one process."
        )
    if total > 1 and strategy in ONE_PROCESS_STRATEGIES:
        raise LaunchError(
            f"Strategy {strategy!r} trains in one process. "
            f"Received: --strategy={strategy} with {total} workers. "
            "Start one worker, or use --strategy multi_worker or horovod."
        )


def _is_alone(existing: Cluster) -> bool:
    return existing.num_workers < 2 and existing.job == WORKER and not existing.launched


def check_alone(total: int, existing: Cluster) -> None:
    """Refuses to start several workers in a process that is part of a cluster.

    Args:
        total: Workers in all.
        existing: The existing cluster.

    Raises:
        LaunchError: This process is part of a cluster.
    """
    if existing.num_workers > 1 or existing.job != WORKER:
        raise LaunchError(
            "Several workers can be started only where no cluster is described yet. "
            f"Received: -n {total}, where {existing.source} already makes this process "
            f"{existing.task} of {existing.num_workers}. Leave -n out to join that cluster, "
            "or unset TF_CONFIG and start outside of srun."
        )


def check_ports(addresses: Sequence[str]) -> None:
    """Refuses addresses of this machine whose port is in use.

    Args:
        addresses: Each a host and a port.

    Raises:
        LaunchError: A port is in use.
    """
    for address in addresses:
        port = int(address.rpartition(":")[2])
        try:
            # As TensorFlow's server binds it, so a port in TIME_WAIT can be used.
            bound_everywhere(port).close()
        except OSError as error:
            raise LaunchError(
                "The port of each worker on this machine must be free. "
                f"Received: port {port}, for {address} ({error.strerror}). "
                "End the program that listens there, or choose another --port, "
                "the same on every host."
            ) from None
