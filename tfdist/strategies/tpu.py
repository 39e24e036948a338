"""The cores of a TPU: `tf.distribute.TPUStrategy`. Never run: no TPU was at hand."""

from __future__ import annotations

import tensorflow as tf

from tfdist.cluster import Cluster
from tfdist.strategies.base import Place
from tfdist.strategies.tf_distribute import TFDistribute


class TPU(TFDistribute):
    """One replica on each core of the TPU that this machine or its environment names."""

    name = "tpu"
    priority = 20

    def __init__(self, cluster: Cluster) -> None:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver.connect(tpu="local")
        strategy = tf.distribute.TPUStrategy(resolver)
        replicas = strategy.num_replicas_in_sync
        super().__init__(strategy, Place(replicas, 0, replicas))

    @classmethod
    def unavailable(cls, cluster: Cluster) -> str | None:
        """Says why not: TensorFlow sees no TPU."""
        if not tf.config.list_physical_devices("TPU"):
            return "TensorFlow sees no TPU on this machine"
        return None

    @classmethod
    def chosen_by(cls, cluster: Cluster) -> str | None:
        """Says why `auto` chooses it: a TPU is here."""
        return "a TPU on this machine" if cls.unavailable(cluster) is None else None
