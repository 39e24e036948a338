"""Who is started: the workers of this machine, of a whole run or of what is left of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from tfdist.cluster import Cluster
from tfdist.errors import LaunchError
from tfdist.launch.existing_cluster import hosts_of
from tfdist.launch.horovod import rendezvous
from tfdist.launch.hosts import Host
from tfdist.launch.plan import plan_workers
from tfdist.launch.slots import Slots
from tfdist.launch.worker import Worker


class Roster:
    """The workers that this machine starts, at first and after others were lost.

    Args:
        command: The program each worker runs, and its arguments.
        workers: How many workers in all.
        hosts: The machines; empty for this one alone.
        node_rank: This machine's position in `hosts`.
        elastic: The numbers of workers between which the run may go on, or None.
        **options: Of `plan_workers`.

    Attributes:
        elastic: As passed.
        workers: Those of the first start.
        slots: The places of an elastic run of one machine; else None.

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
        self._hosts, self._there, self._node_rank = hosts, tuple(hosts), node_rank
        if elastic is not None:
            self._check(elastic, workers)
            workers = elastic[1]
        self.slots = Slots(self._of, *elastic) if elastic is not None and not hosts else None
        self.workers: tuple[Worker, ...] = (
            self._of(workers) if self.slots is None else tuple(self.slots.workers)
        )

    def of_hosts(self, ranks: Sequence[int]) -> Sequence[Worker]:
        """Gives the workers of a start with some of the hosts.

        Args:
            ranks: Their positions, this machine's among them.
        """
        self._there = tuple(self._hosts[rank] for rank in ranks)
        return self._of(sum(host.slots for host in self._there))

    def meeting(self, first: Worker) -> AbstractContextManager[None]:
        """Makes a context around a start: where its workers meet.

        Args:
            first: The first of them.
        """
        if "HOROVOD_RANK" not in first.environment or "HOROVOD_RANK" in os.environ:
            return nullcontext()  # no ranks, or ranks of horovodrun, which has its own
        cluster = Cluster.from_environment()
        joined = hosts_of(cluster) if len(cluster.workers) > 1 and not self._there else ()
        return rendezvous(first.environment, self._there or joined)

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

    def _of(self, count: int | None) -> tuple[Worker, ...]:
        options, rank = self._options, self._node_rank
        if self.elastic is not None and count == 1:
            options = {**options, "strategy": None}  # one that is left needs none of several
        if rank is not None and len(self._there) < len(self._hosts):
            rank = self._there.index(self._hosts[rank])
        return plan_workers(
            self._command, workers=count, hosts=self._there, node_rank=rank, **options
        )
