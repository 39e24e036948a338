"""Reads TF_CONFIG, and checks it field by field."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tfdist.cluster.environment import whole_number
from tfdist.cluster.jobs import CHIEF, EVALUATOR, JOBS, WORKER, shortened
from tfdist.errors import ClusterError

_MASTER = "master"  # as TensorFlow 1 and older job descriptions call the chief
_EXAMPLE = (
    '{"cluster": {"worker": ["host1:12345", "host2:12345"]}, '
    '"task": {"type": "worker", "index": 0}}'
)


@dataclass(frozen=True)
class TFConfig:
    """The content of TF_CONFIG.

    Attributes:
        jobs: Each job's addresses.
        job: The job of this process.
        index: The position of this process in its job.
    """

    jobs: Mapping[str, tuple[str, ...]]
    job: str = WORKER
    index: int = 0


def read(text: str) -> TFConfig:
    """Reads TF_CONFIG.

    Args:
        text: The variable's value, JSON.

    Raises:
        ClusterError: It is malformed; the message names the field.
    """
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise ClusterError(
            f"`TF_CONFIG` must be JSON. Received: TF_CONFIG={shortened(text)}, "
            f"in which character {error.pos + 1} cannot be read ({error.msg}). "
            f"Write it like {_EXAMPLE}"
        ) from None
    except (ValueError, RecursionError) as error:  # a number too long, lists too deep
        raise ClusterError(
            "`TF_CONFIG` must be JSON that Python can read. Received: "
            f"TF_CONFIG={shortened(text)} ({error}). Write it like {_EXAMPLE}"
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
        return TFConfig({})
    if not task:
        if sum(map(len, jobs.values())) == 1 and set(jobs) <= {CHIEF, WORKER}:
            return TFConfig(jobs, next(iter(jobs)))
        raise ClusterError(
            "`TF_CONFIG.task` must say which process of the cluster this one is. "
            f"Received: TF_CONFIG.task={config.get('task')!r}. "
            "Add a task, different in each process, such as "
            '"task": {"type": "worker", "index": 0}.'
        )
    job = _job(task, jobs)
    index = _index(task, job, jobs)
    return TFConfig({} if job == EVALUATOR else jobs, job, index)


def _jobs(cluster: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    jobs: dict[str, tuple[str, ...]] = {}
    field_of_address: dict[str, str] = {}
    if CHIEF in cluster and _MASTER in cluster:
        raise ClusterError(
            "`TF_CONFIG.cluster` must have one chief. Received: both 'chief' and 'master', "
            "two names of it. Remove one of them."
        )
    for key, addresses in cluster.items():
        name = f"TF_CONFIG.cluster.{key}"
        job = CHIEF if key == _MASTER else key
        if job not in JOBS:
            raise ClusterError(
                f"`TF_CONFIG.cluster` must have no other jobs than {_listed(JOBS)}. "
                f"Received: a job {shortened(key)}. Rename or remove it."
            )
        if isinstance(addresses, dict):
            raise _sparse(name, addresses)
        if not isinstance(addresses, list):
            raise ClusterError(
                f"`{name}` must be a list of addresses 'host:port'. "
                f"Received: {name}={shortened(addresses)}. "
                'Write it like ["host1:12345", "host2:12345"].'
            )
        if job == CHIEF and len(addresses) > 1:
            raise ClusterError(
                f"`{name}` must have one address. Received: {len(addresses)} addresses, "
                f"{shortened(addresses)}. Move all but the first to the job 'worker'."
            )
        for position, address in enumerate(addresses):
            field_name = f"{name}[{position}]"
            address = check_address(address, field_name)
            if address in field_of_address:
                raise ClusterError(
                    "Each process in `TF_CONFIG.cluster` must have an address of its own. "
                    f"Received: {address!r} in both {field_of_address[address]} and "
                    f"{field_name}. Give one of them another port."
                )
            field_of_address[address] = field_name
        if addresses:
            jobs[job] = tuple(address.strip() for address in addresses)
    return jobs


def _sparse(name: str, value: object) -> ClusterError:
    return ClusterError(
        "`TF_CONFIG.cluster` must list the addresses of all processes. Received: "
        f"{name}={shortened(value)}, which names only those that this process talks to, as a "
        "TFJob with enableDynamicWorker writes it. Set enableDynamicWorker: false in the job."
    )


def _job(task: Mapping[str, Any], jobs: Mapping[str, tuple[str, ...]]) -> str:
    job = task.get("type")
    job = CHIEF if job == _MASTER else job
    # An evaluator is not part of the cluster: TensorFlow and Kubernetes do not list it.
    if isinstance(job, str) and (job in jobs or job == EVALUATOR):
        return job
    raise ClusterError(
        f"`TF_CONFIG.task.type` must be a job of TF_CONFIG.cluster: {_listed(tuple(jobs))}. "
        f"Received: TF_CONFIG.task.type={shortened(job)}. "
        "Correct the type, or add the job's addresses to the cluster."
    )


def _index(task: Mapping[str, Any], job: str, jobs: Mapping[str, tuple[str, ...]]) -> int:
    value = task.get("index")
    # Some Kubernetes operators and shell scripts write the number as a string.
    index = whole_number(value) if isinstance(value, str) else value
    count = len(jobs[job]) if job in jobs else 1
    rule = f"`TF_CONFIG.task.index` must be a whole number from 0 to {count - 1}, as the "
    rule += f"cluster has {count} {job} address{'' if count == 1 else 'es'}. "
    received = f"Received: TF_CONFIG.task.index={shortened(value)}. "
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
        f"`{name}` must be a JSON object. Received: {name}={shortened(value)}. "
        f"Write TF_CONFIG like {_EXAMPLE}"
    )


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(repr(name) for name in names)


def check_address(address: object, name: str) -> str:
    """Checks that an address is a host and a port.

    Args:
        address: The address, such as `"10.0.0.1:12345"` or `"[::1]:12345"`.
        name: The field that holds it, for the error message.

    Returns:
        The address, without spaces around it.

    Raises:
        ClusterError: It is not `"host:port"` with a port from 1 to 65535.
    """
    rule = f"`{name}` must be an address 'host:port' with a port from 1 to 65535. "
    received = f"Received: {name}={shortened(address)}. "
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
