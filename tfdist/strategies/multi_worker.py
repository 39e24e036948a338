"""Several processes: `tf.distribute.MultiWorkerMirroredStrategy`."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from tfdist import _keras
from tfdist._version import __version__
from tfdist.cluster import Cluster
from tfdist.cluster.rendezvous import START_TIMEOUT, meet, start_timeout
from tfdist.errors import StrategyError
from tfdist.strategies.base import Place
from tfdist.strategies.coordination_store import CoordinationStore
from tfdist.strategies.tf_distribute import (
    MultiWorkerMirroredStrategy,
    TFDistribute,
    require_unused_tensorflow,
)
from tfdist.watchdog.timeouts import WaitLimit


class MultiWorker(TFDistribute):
    """One replica on each GPU of each worker, or one on each worker without GPUs."""

    name = "multi_worker"
    priority = 30

    def __init__(self, cluster: Cluster) -> None:
        # TensorFlow creates its devices once in a process, and can join a cluster only before.
        require_unused_tensorflow(cluster)
        strategy = _connect(cluster)
        local = len(strategy.extended.worker_devices)
        store = CoordinationStore.of_this_process(cluster.num_workers)
        super().__init__(
            strategy,
            Place(
                num_replicas=strategy.num_replicas_in_sync,
                first_replica=cluster.worker_index * local,
                local_replicas=local,
                num_workers=cluster.num_workers,
                worker_index=cluster.worker_index,
            ),
            WaitLimit.from_environment(cluster.task, store, cluster.worker_index),
            store,
        )

    @classmethod
    def unavailable(cls, cluster: Cluster) -> str | None:
        """Returns an obstacle if there is one worker or there are parameter servers."""
        if cluster.has_parameter_servers:
            return "the cluster has parameter servers, which multi_worker does not use"
        if cluster.launched:
            return f"{cluster.source} started the processes, without addresses: use horovod"
        if cluster.num_workers < 2:
            return (
                "there is no cluster of several workers (TF_CONFIG): start the script with "
                "`tfdist run -n 2 script.py`"
            )
        return None

    @classmethod
    def chosen_by(cls, cluster: Cluster) -> str | None:
        """Returns the reason for `auto`: the cluster has several workers."""
        if len(cluster.workers) > 1 and not cluster.has_parameter_servers:
            return f"{cluster.num_workers} workers in {cluster.source}"
        return None


def _connect(cluster: Cluster) -> Any:
    """Starts TensorFlow's server and waits for the other workers, up to a limit."""
    seconds = start_timeout()
    # TensorFlow itself would wait for a worker that never starts, and not say which one it is.
    meet(
        cluster,
        seconds,
        f"tfdist {__version__}, tensorflow {tf.__version__}, keras {keras.__version__}",
    )
    jobs = {job: list(cluster.jobs[job]) for job in cluster.jobs if job in ("chief", "worker")}
    spec = tf.train.ClusterSpec(jobs)
    # The coordination service runs in the chief, or in worker 0 if no task is the chief.
    leader = next(job for job in ("chief", "worker") if job in jobs)
    counts = {job: len(tasks) for job, tasks in jobs.items()}
    # Before the strategy, which uses a configuration that is there already.
    _keras.configure_coordination(counts, leader, seconds)
    try:
        return MultiWorkerMirroredStrategy(
            cluster_resolver=tf.distribute.cluster_resolver.SimpleClusterResolver(
                spec, task_type=cluster.job, task_id=cluster.index, rpc_layer="grpc"
            ),
        )
    except (tf.errors.OpError, RuntimeError) as error:
        raise StrategyError(
            f"All {cluster.num_workers} workers must come up within {seconds} s "
            f"({START_TIMEOUT}). Received: {cluster.task} of {', '.join(cluster.workers)} "
            f"could not connect: {error}. See the output of the other workers."
        ) from error
