"""The processes of a run, and which launcher starts each: what must be able to connect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tfdist.cluster import CHIEF, WORKER, Cluster
from tfdist.launch.hosts import Host, worker_addresses
from tfdist.launch.plan import server_clusters
from tfdist.launch.worker import Worker


@dataclass(frozen=True)
class Task:
    """A process of the run.

    Attributes:
        name: Its name, such as "worker 1".
        address: Its address, "host:port".
    """

    name: str
    address: str

    @property
    def host(self) -> str:
        """The name of its machine."""
        return self.address.rpartition(":")[0]

    @property
    def port(self) -> int:
        """The port at which it listens."""
        return int(self.address.rpartition(":")[2])


@dataclass(frozen=True)
class Peers:
    """All processes of a run, by the launcher that starts them.

    Attributes:
        tasks: The processes.
        launchers: The positions in `tasks` of each launcher's processes.
        local: The position in `launchers` of this launcher.
    """

    tasks: tuple[Task, ...]
    launchers: tuple[tuple[int, ...], ...]
    local: int

    @property
    def here(self) -> tuple[int, ...]:
        """The positions of the processes that this launcher starts."""
        return self.launchers[self.local]

    @property
    def hosts(self) -> tuple[str, ...]:
        """The machines, each once."""
        return tuple(dict.fromkeys(task.host for task in self.tasks))

    @property
    def heads(self) -> tuple[int, ...]:
        """The first process of each machine."""
        first = {task.host: i for i, task in reversed(list(enumerate(self.tasks)))}
        return tuple(sorted(first.values()))

    def launcher_of(self, task: int) -> int:
        """Returns the position of the launcher that starts a process.

        Args:
            task: Its position in `tasks`.
        """
        return next(i for i, own in enumerate(self.launchers) if task in own)


def peers_of_hosts(hosts: Sequence[Host], node_rank: int, port: int, servers: int = 0) -> Peers:
    """Lists the processes of `tfdist run --hosts`.

    Args:
        hosts: The machines.
        node_rank: The position of this machine.
        port: The port of worker 0.
        servers: How many parameter servers there are.
    """
    total = sum(host.slots for host in hosts)
    if servers:
        places = server_clusters(hosts, total, servers, port)
        tasks = [Task(c.task, c.jobs[c.job][c.index]) for c in places]
    else:
        addresses = worker_addresses(hosts, port)
        tasks = [Task(f"{WORKER} {i}", address) for i, address in enumerate(addresses)]
    names = [host.name for host in hosts]
    launchers = tuple(
        tuple(i for i, task in enumerate(tasks) if task.host == name) for name in names
    )
    return Peers(tuple(tasks), launchers, node_rank)


def peers_of_cluster(worker: Worker) -> Peers | None:
    """Lists the processes of a cluster that this process joins: each has its own launcher.

    Args:
        worker: The only worker of this launcher.

    Returns:
        The processes; None if there is only one, or their addresses are not known.
    """
    cluster = Cluster.from_environment(worker.environment)
    places = [
        (job, i) for job, addresses in cluster.jobs.items() for i in range(len(addresses))
    ]
    if len(places) < 2 or (cluster.job, cluster.index) not in places:
        return None
    places.sort(key=lambda place: place[0] != CHIEF)
    tasks = tuple(
        Task(Cluster(cluster.jobs, job, i).task, cluster.jobs[job][i]) for job, i in places
    )
    return Peers(
        tasks,
        tuple((i,) for i in range(len(tasks))),
        places.index((cluster.job, cluster.index)),
    )
