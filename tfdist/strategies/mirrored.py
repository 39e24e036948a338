"""Several devices of one process: `tf.distribute.MirroredStrategy`."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tfdist.cluster import Cluster
from tfdist.strategies.base import Place
from tfdist.strategies.tf_distribute import MirroredStrategy, TFDistribute


class Mirrored(TFDistribute):
    """One replica on each GPU, or on each logical CPU when there is no GPU."""

    name = "mirrored"
    priority = 10

    def __init__(self, cluster: Cluster) -> None:
        devices = _devices()
        strategy = MirroredStrategy([device.name for device in devices])
        super().__init__(strategy, Place(len(devices), 0, len(devices)))

    @classmethod
    def unavailable(cls, cluster: Cluster) -> str | None:
        """Returns an obstacle if there are several workers: `multi_worker` serves them."""
        if cluster.num_workers > 1:
            return (
                f"the cluster has {cluster.num_workers} workers and mirrored knows one: "
                'use strategy="multi_worker"'
            )
        return None

    @classmethod
    def chosen_by(cls, cluster: Cluster) -> str | None:
        """Returns the reason for `auto`: this process has several GPUs."""
        gpus = len(tf.config.list_physical_devices("GPU"))
        return f"{gpus} GPUs in this process" if gpus > 1 else None


def _devices() -> list[Any]:
    gpus: list[Any] = tf.config.list_logical_devices("GPU")
    return gpus or list(tf.config.list_logical_devices("CPU"))
