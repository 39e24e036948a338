"""One process's place in the cluster, read from the environment. No TensorFlow is needed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from tfdist.environ import whole_number
from tfdist.errors import ClusterError
from tfdist.slurm import workers_from_slurm

CHIEF = "chief"
WORKER = "worker"
PS = "ps"
EVALUATOR = "evaluator"

_JOBS = (CHIEF, WORKER, PS, EVALUATOR)
_MASTER = "master"  # as TensorFlow 1 and older job descriptions call the chief
_EXAMPLE = (
    '{"cluster": {"worker": ["host1:12345", "host2:12345"]}, '
    '"task": {"type": "worker", "index": 0}}'
)


@dataclass(frozen=True)
class Cluster:
    """Which processes train together, and which of them this one is.

    Attributes:
        jobs: Each job's addresses, `"host:port"`, by the name TF_CONFIG gives the job:
            `chief`, `worker`, `ps` or `evaluator`. Empty for a single process, and for an
            evaluator, which stands outside.
        job: The job of this process.
        index: The position of this process in its job.
        source: What described the cluster: `"TF_CONFIG"`, `"SLURM"`, `"Horovod"`, `"MPI"` or
            `"none"`.
        launched: How many processes `horovodrun` or `mpirun` started, which know each
            other's rank but no addresses; 0 where none of them did.

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
        """Reads the cluster from what a launcher set in the environment.

        A rank that `horovodrun` gave is this process's own and comes first; then TF_CONFIG,
        the variables of `mpirun`, and SLURM's.

        Args:
            environ: The environment variables.

        Returns:
            This process's place; a single process where nothing describes a cluster.

        Raises:
            ClusterError: What describes the cluster is malformed.

        Example:
            >>> config = {"cluster": {"worker": ["a:1", "b:1"]}}
            >>> config["task"] = {"type": "worker", "index": 1}
            >>> Cluster.from_environment({"TF_CONFIG": json.dumps(config)}).task
            'worker 1'
        """
        ranked = _from_ranks(environ, _HOROVOD)
        if ranked is not None:
            return ranked
        text = environ.get("TF_CONFIG", "")
        if text.strip():
            return _from_tf_config(text)
        ranked = _from_ranks(environ, _OPEN_MPI) or _from_ranks(environ, _MPICH)
        if ranked is not None:
            return ranked
        slurm = workers_from_slurm(environ)
        if slurm is not None:
            addresses, index = slurm
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
        """Whether this process is the one that writes: the chief, or the first worker."""
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


# Names of a process's rank and of the number of processes, and one that must be there too.
_HOROVOD = ("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_RANK")
_OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")
_MPICH = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID")  # SLURM's srun may set the first two


def _from_ranks(environ: Mapping[str, str], names: tuple[str, str, str]) -> Cluster | None:
    if not all(name in environ for name in names):
        return None
    (rank_name, rank_text), (size_name, size_text) = ((n, environ[n]) for n in names[:2])
    rank, size = whole_number(rank_text), whole_number(size_text)
    if rank is None or size is None or rank >= size:
        raise ClusterError(
            f"`{rank_name}` must be a whole number from 0 to `{size_name}` - 1. Received: "
            f"{rank_name}={_short(rank_text)}, {size_name}={_short(size_text)}. "
            "They are set by the launcher; unset both to train in one process."
        )
    source = "Horovod" if names is _HOROVOD else "MPI"
    return Cluster({}, WORKER, rank, source, size)


def check_address(address: object, name: str) -> str:
    """Checks that an address is a host and a port.

    Args:
        address: What was given, for instance `"10.0.0.1:12345"` or `"[::1]:12345"`.
        name: Where it was given, for the error message.

    Returns:
        The address.

    Raises:
        ClusterError: It is not `"host:port"` with a port from 1 to 65535.
    """
    rule = f"`{name}` must be an address 'host:port' with a port from 1 to 65535. "
    received = f"Received: {name}={_short(address)}. "
    if not isinstance(address, str) or not address.strip():
        raise ClusterError(rule + received + "Give the address of every process.")
    if "/" in address:
        raise ClusterError(rule + received + "Leave out the scheme and the path.")
    host, colon, port = address.strip().rpartition(":")
    if not colon or not host or host.endswith(":"):
        raise ClusterError(rule + received + "Add the port on which that process listens.")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ClusterError(rule + received + "Put an IPv6 address in brackets: '[::1]:12345'.")
    if not 1 <= (whole_number(port) or 0) <= 65535:
        raise ClusterError(rule + received + "Correct the port.")
    return address.strip()


def _from_tf_config(text: str) -> Cluster:
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise ClusterError(
            f"`TF_CONFIG` must be JSON. Received: TF_CONFIG={_short(text)}, "
            f"in which character {error.pos + 1} cannot be read ({error.msg}). "
            f"Write it like {_EXAMPLE}"
        ) from None
    except (ValueError, RecursionError) as error:  # a number too long, lists too deep
        raise ClusterError(
            "`TF_CONFIG` must be JSON that Python can read. Received: "
            f"TF_CONFIG={_short(text)} ({error}). Write it like {_EXAMPLE}"
        ) from None
    config = _object(config, "TF_CONFIG")
    if "sparseCluster" in config:
        raise _sparse("TF_CONFIG.sparseCluster", config["sparseCluster"])
    jobs = _jobs(_object(config.get("cluster") or {}, "TF_CONFIG.cluster"))
    task = _object(config.get("task") or {}, "TF_CONFIG.task")
    if not jobs:
        if task:
            raise ClusterError(
                "`TF_CONFIG.cluster` must list the addresses of each job where there is a "
                f"task. Received: TF_CONFIG.cluster={config.get('cluster')!r}. "
                f"Write it like {_EXAMPLE}, or unset TF_CONFIG to train in one process."
            )
        return Cluster(source="TF_CONFIG")
    if not task:
        if sum(map(len, jobs.values())) == 1 and set(jobs) <= {CHIEF, WORKER}:
            return Cluster(jobs, next(iter(jobs)), 0, "TF_CONFIG")
        raise ClusterError(
            "`TF_CONFIG.task` must say which process of the cluster this one is. "
            f"Received: TF_CONFIG.task={config.get('task')!r}. "
            "Add a task, different in each process, such as "
            '"task": {"type": "worker", "index": 0}.'
        )
    job = _job(task, jobs)
    index = _index(task, job, jobs)
    return Cluster({} if job == EVALUATOR else jobs, job, index, "TF_CONFIG")


def _jobs(cluster: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    jobs: dict[str, tuple[str, ...]] = {}
    seen: dict[str, str] = {}
    if CHIEF in cluster and _MASTER in cluster:
        raise ClusterError(
            "`TF_CONFIG.cluster` must have one chief. Received: both 'chief' and 'master', "
            "two names of it. Remove one of them."
        )
    for given, addresses in cluster.items():
        name = f"TF_CONFIG.cluster.{given}"
        job = CHIEF if given == _MASTER else given
        if job not in _JOBS:
            raise ClusterError(
                f"`TF_CONFIG.cluster` must have no other jobs than {_listed(_JOBS)}. "
                f"Received: a job {_short(given)}. Rename or remove it."
            )
        if isinstance(addresses, dict):
            raise _sparse(name, addresses)
        if not isinstance(addresses, list):
            raise ClusterError(
                f"`{name}` must be a list of addresses 'host:port'. "
                f"Received: {name}={_short(addresses)}. "
                'Write it like ["host1:12345", "host2:12345"].'
            )
        if job == CHIEF and len(addresses) > 1:
            raise ClusterError(
                f"`{name}` must have one address. Received: {len(addresses)} addresses, "
                f"{_short(addresses)}. Move all but the first to the job 'worker'."
            )
        for position, address in enumerate(addresses):
            field_name = f"{name}[{position}]"
            address = check_address(address, field_name)
            if address in seen:
                raise ClusterError(
                    "Each process in `TF_CONFIG.cluster` must have an address of its own. "
                    f"Received: {address!r} in both {seen[address]} and {field_name}. "
                    "Give one of them another port."
                )
            seen[address] = field_name
        if addresses:
            jobs[job] = tuple(address.strip() for address in addresses)
    return jobs


def _sparse(name: str, value: object) -> ClusterError:
    return ClusterError(
        "`TF_CONFIG.cluster` must list the addresses of all processes. Received: "
        f"{name}={_short(value)}, which names only those that this process talks to, as a "
        "TFJob with enableDynamicWorker writes it. Set enableDynamicWorker: false in the job."
    )


def _job(task: Mapping[str, Any], jobs: Mapping[str, tuple[str, ...]]) -> str:
    job = task.get("type")
    job = CHIEF if job == _MASTER else job
    # An evaluator stands outside the cluster: TensorFlow and Kubernetes leave it off the list.
    if isinstance(job, str) and (job in jobs or job == EVALUATOR):
        return job
    raise ClusterError(
        f"`TF_CONFIG.task.type` must be a job of TF_CONFIG.cluster: {_listed(tuple(jobs))}. "
        f"Received: TF_CONFIG.task.type={_short(job)}. "
        "Correct the type, or add the job's addresses to the cluster."
    )


def _index(task: Mapping[str, Any], job: str, jobs: Mapping[str, tuple[str, ...]]) -> int:
    value = task.get("index")
    # Some Kubernetes operators and shell scripts write the number as a string.
    index = whole_number(value) if isinstance(value, str) else value
    count = len(jobs[job]) if job in jobs else 1
    rule = f"`TF_CONFIG.task.index` must be a whole number from 0 to {count - 1}, as the "
    rule += f"cluster has {count} {job} address{'' if count == 1 else 'es'}. "
    received = f"Received: TF_CONFIG.task.index={_short(value)}. "
    if not isinstance(index, int) or isinstance(index, bool):
        raise ClusterError(rule + received + "Give each process its position in its job.")
    if not 0 <= index < count:
        raise ClusterError(
            rule + received + "Count from 0, or add this process's address to the cluster."
        )
    return index


def _object(value: object, name: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise ClusterError(
        f"`{name}` must be a JSON object. Received: {name}={_short(value)}. "
        f"Write TF_CONFIG like {_EXAMPLE}"
    )


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(repr(name) for name in names)


def _short(value: object, limit: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
