"""The cluster: which processes train together, and which of them this process is."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from tfdist.cluster import ranks, slurm, tf_config
from tfdist.cluster.jobs import CHIEF, PS, WORKER
from tfdist.errors import ClusterError


@dataclass(frozen=True)
class Cluster:
    """Which processes train together, and which of them this process is.

    Attributes:
        jobs: Each job's addresses, `"host:port"`, by the name TF_CONFIG gives the job:
            `chief`, `worker`, `ps` or `evaluator`. Empty for a single process, and for an
            evaluator, which is not part of the cluster.
        job: The job of this process.
        index: The position of this process in its job.
        source: What described the cluster: `"TF_CONFIG"`, `"SLURM"`, `"Horovod"`, `"MPI"` or
            `"none"`.
        launched: How many processes `horovodrun` or `mpirun` started; 0 if neither did. Such
            processes know each other's rank but no addresses.

    Example:
        >>> cluster = Cluster.from_environment({})
        >>> cluster.num_workers, cluster.is_chief
        (1, True)
    """

    jobs: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    job: str = WORKER
    index: int = 0
    source: str = "none"
    launched: int = 0

    def __post_init__(self) -> None:
        # A frozen cluster whose jobs could be changed would not be frozen.
        object.__setattr__(self, "jobs", MappingProxyType(dict(self.jobs)))

    def __reduce__(
        self,
    ) -> tuple[type[Cluster], tuple[dict[str, tuple[str, ...]], str, int, str, int]]:
        # A mapping proxy cannot be pickled.
        return Cluster, (dict(self.jobs), self.job, self.index, self.source, self.launched)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Cluster:
        """Reads the cluster from the environment variables that a launcher set.

        The first of these that is set counts: the rank of `horovodrun`, TF_CONFIG, the rank
        of `mpirun`, SLURM's variables.

        Args:
            environ: The environment variables.

        Returns:
            The cluster; a single process if no variable describes a cluster.

        Raises:
            ClusterError: The variables are malformed.

        Example:
            >>> config = {"cluster": {"worker": ["a:1", "b:1"]}}
            >>> config["task"] = {"type": "worker", "index": 1}
            >>> Cluster.from_environment({"TF_CONFIG": json.dumps(config)}).task
            'worker 1'
        """
        launched_rank = ranks.from_horovod(environ)
        if launched_rank is not None:
            return cls(index=launched_rank.rank, source="Horovod", launched=launched_rank.size)
        text = environ.get("TF_CONFIG", "")
        if text.strip():
            task = tf_config.read(text)
            return cls(task.jobs, task.job, task.index, "TF_CONFIG")
        launched_rank = ranks.from_mpi(environ)
        if launched_rank is not None:
            return cls(index=launched_rank.rank, source="MPI", launched=launched_rank.size)
        step = slurm.workers_from_slurm(environ)
        if step is not None:
            addresses, index = step
            return cls({WORKER: addresses}, WORKER, index, "SLURM")
        return cls()

    @property
    def workers(self) -> tuple[str, ...]:
        """The addresses of the processes that train, the chief's first."""
        return self.jobs.get(CHIEF, ()) + self.jobs.get(WORKER, ())

    @property
    def num_workers(self) -> int:
        """How many processes train; 1 for a single process."""
        return max(1, self.launched, len(self.workers))

    @property
    def worker_index(self) -> int:
        """The position of this process among the workers; the chief's is 0.

        Raises:
            ClusterError: This process is a parameter server or an evaluator.
        """
        if self.job == CHIEF:
            return 0
        if self.job == WORKER:
            return len(self.jobs.get(CHIEF, ())) + self.index
        raise ClusterError(
            "Only a chief or a worker has a position among the workers. "
            f"Received: task={self.task!r}. "
            "Run training in the chief and worker processes only."
        )

    @property
    def is_chief(self) -> bool:
        """Whether this process writes the files: the chief, or else the first worker."""
        return self.job in (CHIEF, WORKER) and self.worker_index == 0

    @property
    def task(self) -> str:
        """This process's name in messages, such as `"worker 1"` or `"chief"`."""
        return self.job if self.job == CHIEF else f"{self.job} {self.index}"

    @property
    def has_parameter_servers(self) -> bool:
        """Whether the cluster has a `ps` job."""
        return bool(self.jobs.get(PS))

    def to_tf_config(self) -> str:
        """Returns the cluster and this process's task as TF_CONFIG's JSON."""
        if not self.jobs:
            return "{}"
        return json.dumps(
            {
                "cluster": {job: list(addresses) for job, addresses in self.jobs.items()},
                "task": {"type": self.job, "index": self.index},
            }
        )
