"""The processes of a parameter-server cluster: the chief connects, the others serve it."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NoReturn

import tensorflow as tf

from tfdist.cluster import CHIEF, PS, WORKER, Cluster
from tfdist.cluster.rendezvous import answers, is_up, start_timeout, wait_until_up
from tfdist.errors import ServerLostError, StrategyError
from tfdist.strategies.tf_distribute import (
    ClusterCoordinator,
    ParameterServerStrategy,
    require_unused_tensorflow,
)

_POLL_S = 0.5
_ANSWER_TIMEOUT_S = 5.0
_MAX_MISSED = 4  # consecutive polls without an answer, after which the chief counts as gone


@dataclass(frozen=True)
class Servers:
    """The workers and servers that the chief is connected to.

    Attributes:
        strategy: TensorFlow's strategy, by which a `ClusterCoordinator` finds the workers.
        workers: The device of each worker.
        servers: The CPU device of each parameter server.
        addresses: `host:port` of every worker and server by its task, such as "worker 0".
    """

    strategy: Any
    workers: tuple[str, ...]
    servers: tuple[str, ...]
    addresses: dict[str, str]

    @functools.cached_property
    def coordinator(self) -> Any:
        """Gives functions to free workers. If a worker is lost, another gets its function."""
        return ClusterCoordinator(self.strategy)

    def schedule(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        """Schedules a function on the next free worker.

        Args:
            function: A concrete function, which creates no variables.
            arguments: Its arguments. Of a per-worker value, a worker gets its own.

        Returns:
            A `RemoteValue`.
        """
        # `ClusterCoordinator.schedule` enters the strategy's scope first, in which variables
        # are created. That takes longer than everything else, and is not needed here.
        return self.coordinator._cluster.schedule(function, args=arguments, kwargs={})

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices of all workers, and then those of the servers."""
        return *self.workers, *self.servers

    @contextlib.contextmanager
    def explaining_losses(self, who: str) -> Iterator[None]:
        """Makes a context that says which process was lost, and what you can do.

        Args:
            who: Names the processes that must live until the training ends.

        Raises:
            ServerLostError: One of them was lost.
        """
        try:
            yield
        except tf.errors.UnavailableError:
            lost_tasks = " and ".join(self.silent()) or "one of them"
            raise ServerLostError(
                f"{who} must live until training ends. Received: no answer from {lost_tasks}. "
                "`tfdist run` starts all processes again; with `checkpoint` of `fit` "
                "training goes on from the last one."
            ) from None

    def silent(self) -> list[str]:
        """Names the tasks that do not answer within some seconds."""
        with ThreadPoolExecutor(len(self.addresses)) as pool:
            replies = pool.map(
                lambda address: answers(address, _ANSWER_TIMEOUT_S), self.addresses.values()
            )
            return [
                task
                for task, has_answered in zip(self.addresses, replies, strict=True)
                if not has_answered
            ]


def connected(cluster: Cluster) -> Servers:
    """Connects the chief to all workers and servers. They serve it, and do not return.

    Args:
        cluster: The cluster, as this process sees it.

    Raises:
        StrategyError: It is too late to connect, or a process did not start in time.
    """
    if cluster.job != CHIEF:
        serve(cluster)
    if not connect.cache_info().currsize:
        require_unused_tensorflow(cluster)
    return connect(cluster)


@functools.cache
def connect(cluster: Cluster) -> Servers:
    """Connects the chief to all workers and servers, once in a process.

    Args:
        cluster: The cluster, as the chief sees it.

    Raises:
        StrategyError: A worker or server did not start in time.
    """
    addresses = {
        f"{job} {index}": address
        for job in (WORKER, PS)
        for index, address in enumerate(cluster.jobs[job])
    }
    wait_until_up(addresses, start_timeout())
    strategy = ParameterServerStrategy(
        tf.distribute.cluster_resolver.SimpleClusterResolver(
            _spec(cluster), task_type=CHIEF, task_id=0, rpc_layer="grpc"
        )
    )
    gpus = [device.name for device in tf.config.list_logical_devices("GPU")]
    return Servers(
        strategy,
        worker_devices(len(cluster.jobs[WORKER]), gpus),
        tuple(
            f"/job:{PS}/replica:0/task:{i}/device:CPU:0" for i in range(len(cluster.jobs[PS]))
        ),
        addresses,
    )


def worker_devices(workers: int, gpus: Sequence[str]) -> tuple[str, ...]:
    """Returns the device on which each worker computes: its first GPU, or its CPU.

    Args:
        workers: How many workers there are.
        gpus: The names of all GPUs of the cluster, as the chief sees them.

    Example:
        >>> worker_devices(1, ["/job:worker/replica:0/task:0/device:GPU:0"])
        ('/job:worker/replica:0/task:0/device:GPU:0',)
    """
    tasks = [f"/job:{WORKER}/replica:0/task:{index}/device" for index in range(workers)]
    return tuple(f"{t}:GPU:0" if f"{t}:GPU:0" in gpus else f"{t}:CPU:0" for t in tasks)


def serve(cluster: Cluster) -> NoReturn:
    """Serves the chief until the chief has ended, then ends this process.

    Args:
        cluster: The cluster, as this worker or server sees it.

    Raises:
        StrategyError: The port is taken, or the chief did not start in time.
    """
    (chief,) = cluster.jobs[CHIEF]
    # Operations of different workers can wait for each other. Each needs a thread.
    threads = max(4, len(cluster.jobs[WORKER]) + 2, os.cpu_count() or 1)
    try:
        server = tf.distribute.Server(
            _spec(cluster),
            job_name=cluster.job,
            task_index=cluster.index,
            protocol="grpc",
            config=tf.compat.v1.ConfigProto(inter_op_parallelism_threads=threads),
        )
    except tf.errors.OpError as error:
        address = cluster.jobs[cluster.job][cluster.index]
        raise StrategyError(
            f"The port of {cluster.task} must be free. Received: {address}, but "
            f"{error.message}. Stop what uses it, or choose another."
        ) from error
    wait_until_up({CHIEF: chief}, start_timeout())
    missed_polls = 0
    while missed_polls < _MAX_MISSED:
        time.sleep(_POLL_S)
        missed_polls = 0 if is_up(chief) else missed_polls + 1
    del server
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    # TensorFlow's server cannot be stopped, and keeps the process alive.
    os._exit(0)


def _spec(cluster: Cluster) -> Any:
    return tf.train.ClusterSpec({job: list(cluster.jobs[job]) for job in (CHIEF, WORKER, PS)})
