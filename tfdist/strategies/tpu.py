"""The cores of a TPU: `tf.distribute.TPUStrategy`. It has never run on a TPU."""

from __future__ import annotations

import os

import tensorflow as tf

from tfdist.cluster import Cluster
from tfdist.strategies.base import Place
from tfdist.strategies.tf_distribute import TFDistribute


class TPU(TFDistribute):
    """One replica on each core of the TPU that TPU_NAME names, else of this machine's."""

    name = "tpu"
    priority = 20
    exchanges_parts = False

    def __init__(self, cluster: Cluster) -> None:
        name = os.environ.get("TPU_NAME", "local")
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver.connect(tpu=name)
        strategy = tf.distribute.TPUStrategy(resolver)
        replicas = strategy.num_replicas_in_sync
        super().__init__(strategy, Place(replicas, 0, replicas))

    @classmethod
    def unavailable(cls, cluster: Cluster) -> str | None:
        """Returns an obstacle if TensorFlow sees no TPU and TPU_NAME names none."""
        if "TPU_NAME" in os.environ or tf.config.list_physical_devices("TPU"):
            return None
        return "TensorFlow sees no TPU on this machine, and TPU_NAME names none"

    @classmethod
    def chosen_by(cls, cluster: Cluster) -> str | None:
        """Returns the reason for `auto`: there is a TPU."""
        return "a TPU is there" if cls.unavailable(cluster) is None else None
