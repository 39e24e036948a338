"""The processes of a parameter-server cluster: the chief connects, all others serve it."""

from __future__ import annotations

import functools
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NoReturn

import tensorflow as tf

from tfdist.cluster import CHIEF, PS, WORKER, Cluster
from tfdist.cluster.rendezvous import answers, is_up, start_timeout, wait_until_up
from tfdist.errors import StrategyError
from tfdist.strategies.tf_distribute import ClusterCoordinator, ParameterServerStrategy

_POLL_S = 0.5
_SILENCE_S = 5.0
_GONE = 4  # so often in turn the chief must not answer to be gone


@dataclass(frozen=True)
class Servers:
    """What the chief is connected to.

    Attributes:
        strategy: TensorFlow's, by which a `ClusterCoordinator` finds the workers.
        workers: The device of each worker.
        servers: The processor of each parameter server.
        addresses: `host:port` of every worker and server by its task, such as "worker 0".
    """

    strategy: Any
    workers: tuple[str, ...]
    servers: tuple[str, ...]
    addresses: dict[str, str]

    @functools.cached_property
    def coordinator(self) -> Any:
        """Hands steps to whichever worker is free, and again to another if one is lost."""
        return ClusterCoordinator(self.strategy)

    def schedule(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        """Hands a function to the next worker that is free.

        `ClusterCoordinator.schedule` does the same in the strategy's scope, in which
        variables are made. To enter it takes longer than all the rest.

        Args:
            function: A concrete function, so that nothing is made.
            arguments: Its arguments; of values per worker a worker gets its own.

        Returns:
            A `RemoteValue`.
        """
        return self.coordinator._cluster.schedule(function, args=arguments, kwargs={})

    def silent(self) -> list[str]:
        """Names the tasks that do not answer now, within some seconds."""
        with ThreadPoolExecutor(len(self.addresses)) as pool:
            heard = pool.map(
                lambda address: answers(address, _SILENCE_S), self.addresses.values()
            )
            return [
                task
                for task, is_there in zip(self.addresses, heard, strict=True)
                if not is_there
            ]


@functools.cache
def connect(cluster: Cluster) -> Servers:
    """Connects the chief to all workers and servers, once in a process.

    Args:
        cluster: The chief's place.

    Raises:
        StrategyError: A worker or server did not come up in time.
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
    gpus = {d.name.rpartition("/")[0]: d.name for d in tf.config.list_logical_devices("GPU")}
    tasks = [f"/job:{WORKER}/replica:0/task:{i}" for i in range(len(cluster.jobs[WORKER]))]
    return Servers(
        strategy,
        tuple(gpus.get(f"{task}/device:GPU:0", f"{task}/device:CPU:0") for task in tasks),
        tuple(
            f"/job:{PS}/replica:0/task:{i}/device:CPU:0" for i in range(len(cluster.jobs[PS]))
        ),
        addresses,
    )


def serve(cluster: Cluster) -> NoReturn:
    """Does what the chief asks for until the chief has ended, and then ends this process.

    Args:
        cluster: This process's place, a worker's or a server's.

    Raises:
        StrategyError: The port is taken, or the chief did not come up in time.
    """
    (chief,) = cluster.jobs[CHIEF]
    # Each worker may have an operation under way that waits for another worker's.
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
    missed = 0
    while missed < _GONE:
        time.sleep(_POLL_S)
        missed = 0 if is_up(chief) else missed + 1
    del server
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    # TensorFlow's server cannot be stopped, and would keep the process.
    os._exit(0)


def _spec(cluster: Cluster) -> Any:
    return tf.train.ClusterSpec({job: list(cluster.jobs[job]) for job in (CHIEF, WORKER, PS)})
