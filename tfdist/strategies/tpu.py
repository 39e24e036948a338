"""The cores of a TPU: `tf.distribute.TPUStrategy`. Never run: no TPU was at hand."""

from __future__ import annotations

import os

import tensorflow as tf

from tfdist.cluster import Cluster
from tfdist.strategies.base import Place
from tfdist.strategies.tf_distribute import TFDistribute


class TPU(TFDistribute):
    """One replica on each core of this machine's TPU, or of the one that TPU_NAME names."""

    name = "tpu"
    priority = 20

    def __init__(self, cluster: Cluster) -> None:
        name = os.environ.get("TPU_NAME", "local")
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver.connect(tpu=name)
        strategy = tf.distribute.TPUStrategy(resolver)
        replicas = strategy.num_replicas_in_sync
        super().__init__(strategy, Place(replicas, 0, replicas))

    @classmethod
    def unavailable(cls, cluster: Cluster) -> str | None:
        """Says why not: TensorFlow sees no TPU, and none is named."""
        if "TPU_NAME" in os.environ or tf.config.list_physical_devices("TPU"):
            return None
        return "TensorFlow sees no TPU on this machine, and TPU_NAME names none"

    @classmethod
    def chosen_by(cls, cluster: Cluster) -> str | None:
        """Says why `auto` chooses it: a TPU is there."""
        return "a TPU is there" if cls.unavailable(cluster) is None else None
