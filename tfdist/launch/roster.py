"""The workers that this machine starts, in a whole run or in what is left of an elastic run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from tfdist.cluster import Cluster
from tfdist.errors import LaunchError
from tfdist.launch.existing_cluster import hosts_of
from tfdist.launch.horovod_rendezvous import rendezvous
from tfdist.launch.hosts import Host
from tfdist.launch.plan import plan_workers
from tfdist.launch.slots import ElasticSlots
from tfdist.launch.worker import Worker


class Roster:
    """The workers that this machine starts, at first and after workers were lost.

    Args:
        command: The program each worker runs, and its arguments.
        workers: Workers in all.
        hosts: The machines; empty if there is only this one.
        node_rank: This machine's position in `hosts`.
        elastic: The least and the most workers of an elastic run, or None.
        **options: Options of `plan_workers`.

    Attributes:
        elastic: The argument of the same name.
        workers: The workers of the first start.
        slots: The slots of an elastic run on one machine, otherwise None.

    Raises:
        LaunchError: The arguments contradict each other or the environment.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        workers: int | None,
        hosts: Sequence[Host],
        node_rank: int | None,
        elastic: tuple[int, int] | None,
        **options: Any,
    ) -> None:
        self.elastic = elastic
        self._command, self._options = command, options
        self._hosts, self._active_hosts, self._node_rank = hosts, tuple(hosts), node_rank
        self._count = workers
        if elastic is not None:
            self._check(elastic, workers)
            workers = elastic[1]
        self.slots = (
            ElasticSlots(self._plan, *elastic) if elastic is not None and not hosts else None
        )
        self.workers: tuple[Worker, ...] = (
            self._plan(workers) if self.slots is None else tuple(self.slots.workers)
        )

    def again(self) -> Sequence[Worker]:
        """Returns this machine's workers for a further start; on one machine with new ports."""
        return self.workers if self._hosts else self._plan(self._count)

    def of_hosts(self, ranks: Sequence[int]) -> Sequence[Worker]:
        """Returns this machine's workers for a start with some of the hosts.

        Args:
            ranks: The positions of these hosts; this machine is one of them.
        """
        self._active_hosts = tuple(self._hosts[rank] for rank in ranks)
        return self._plan(sum(host.slots for host in self._active_hosts))

    def meeting(self, first: Worker) -> AbstractContextManager[None]:
        """Makes a context around a start: the rendezvous server, if its workers need one.

        Args:
            first: The first worker of this machine.
        """
        if "HOROVOD_RANK" not in first.environment or "HOROVOD_RANK" in os.environ:
            return nullcontext()  # no Horovod, or horovodrun, which has its own server
        cluster = Cluster.from_environment()
        cluster_hosts = (
            hosts_of(cluster) if len(cluster.workers) > 1 and not self._active_hosts else ()
        )
        return rendezvous(first.environment, self._active_hosts or cluster_hosts)

    def _check(self, elastic: tuple[int, int], workers: int | None) -> None:
        if self._options.get("servers") or workers is not None:
            raise LaunchError(
                "--elastic must not come with -n or --ps: it gives the number of workers. "
                f"Received: --elastic {elastic[0]}:{elastic[1]}. Leave the other option out."
            )
        slots = sum(host.slots for host in self._hosts)
        if self._hosts and elastic[1] != slots:
            raise LaunchError(
                f"MAX of --elastic must be the sum of the slots in --hosts, {slots}. "
                f"Received: --elastic {elastic[0]}:{elastic[1]}. Change one of them."
            )

    def _plan(self, count: int | None) -> tuple[Worker, ...]:
        options, rank = self._options, self._node_rank
        if self.elastic is not None and count == 1:
            options = {**options, "strategy": None}  # one worker needs no distribution
        if rank is not None and len(self._active_hosts) < len(self._hosts):
            rank = self._active_hosts.index(self._hosts[rank])
        return plan_workers(
            self._command, workers=count, hosts=self._active_hosts, node_rank=rank, **options
        )
