"""Joins an existing cluster: `tfdist run` starts one process, which takes its place there."""

from __future__ import annotations

import itertools
import os

from tfdist.cluster import EVALUATOR, PS, Cluster
from tfdist.cluster.rendezvous import start_timeout, wait_until_resolved
from tfdist.errors import LaunchError
from tfdist.launch.horovod import rank_environments, secret_for
from tfdist.launch.hosts import Host

ONE_PROCESS_STRATEGIES = ("single", "mirrored", "tpu")


def check_strategy(cluster: Cluster, strategy: str | None) -> None:
    """Refuses a strategy with which the processes of a cluster would train separately.

    Args:
        cluster: The cluster, with this process's place.
        strategy: The value of `--strategy`.

    Raises:
        LaunchError: The strategy trains in one process, or cannot use the cluster's servers.
    """
    if strategy in ONE_PROCESS_STRATEGIES and cluster.num_workers > 1:
        raise LaunchError(
            f"Strategy {strategy!r} trains in one process: each process of a cluster would "
            f"train alone. Received: --strategy={strategy}, where {cluster.source} makes this "
            f"process {cluster.task} of {cluster.num_workers}. Leave --strategy out, or use "
            "multi_worker or horovod; to train alone, unset TF_CONFIG and start outside of "
            "srun."
        )
    if strategy == "horovod" and cluster.has_parameter_servers:
        raise LaunchError(
            "Strategy 'horovod' has no parameter servers. Received: --strategy=horovod, where "
            f"{cluster.source} describes {len(cluster.jobs[PS])}. Leave --strategy out, or "
            "take them out of the cluster."
        )


def variables(cluster: Cluster, strategy: str | None) -> dict[str, str]:
    """Returns the environment variables that this process needs besides the existing ones.

    Args:
        cluster: The cluster, with this process's place.
        strategy: The value of `--strategy`.

    Raises:
        LaunchError: Horovod is not installed, or its ranks cannot be assigned to machines.
    """
    of_strategy = {} if strategy is None else {"TFDIST_STRATEGY": strategy}
    if cluster.job == EVALUATOR:
        # An evaluator is not part of the cluster, so it must not distribute training.
        return of_strategy if strategy in ONE_PROCESS_STRATEGIES else {}
    if strategy != "horovod" or not cluster.workers:
        return of_strategy
    hosts, rank = hosts_of(cluster), cluster.worker_index
    ends = itertools.accumulate(host.slots for host in hosts)
    node = next(i for i, end in enumerate(ends) if rank < end)
    # The name of a pod resolves only once the pod exists.
    wait_until_resolved([host.name for host in hosts[:2]], start_timeout())
    secret = secret_for(os.environ, is_alone=False)
    return {**of_strategy, **rank_environments(hosts, node, cluster.workers[0], secret)[rank]}


def hosts_of(cluster: Cluster) -> tuple[Host, ...]:
    """Lists the machines of the workers, with the number of workers on each.

    Args:
        cluster: A cluster with addresses.

    Raises:
        LaunchError: Workers of one machine are not listed side by side.
    """
    names = [address.rpartition(":")[0].strip("[]") for address in cluster.workers]
    hosts = tuple(Host(name, len(list(same))) for name, same in itertools.groupby(names))
    if len({host.name for host in hosts}) < len(hosts):
        raise LaunchError(
            "Horovod needs the workers of one machine side by side in the cluster. Received: "
            f"{', '.join(cluster.workers)} in {cluster.source}. Order them by machine, or use "
            "--strategy multi_worker."
        )
    return hosts
