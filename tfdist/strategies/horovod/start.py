"""How ranks begin: Horovod is started, its process sets are made, news of hosts are heard."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from tfdist.cluster import Cluster
from tfdist.errors import ArgumentError, StrategyError


class HostListener:
    """What Horovod's notification service calls."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        self._on_change = on_change

    def on_hosts_updated(self, timestamp: float, update: int) -> None:
        """Passes it on."""
        self._on_change()


def _sets(hvd: Any, groups: Sequence[Sequence[int]], ranks: int) -> list[Any]:
    """Makes the process sets of groups of ranks; none where all ranks are one group."""
    everyone = sorted(rank for group in groups for rank in group)
    if groups and everyone != list(range(ranks)):
        raise ArgumentError(
            f"`process_sets` must name each of {ranks} ranks once. Received: "
            f"process_sets={[list(group) for group in groups]}."
        )
    return [hvd.ProcessSet(list(group)) for group in groups] if len(groups) > 1 else []


def started(cluster: Cluster, groups: Sequence[Sequence[int]]) -> tuple[Any, Any]:
    """Imports Horovod, connects the ranks and gives this one a GPU of its own.

    Args:
        cluster: Its ranks.
        groups: The ranks that train together; none for all.

    Returns:
        Horovod, and the process set of this rank.
    """
    try:
        import horovod.tensorflow as hvd
    except (ImportError, tf.errors.NotFoundError) as error:
        raise StrategyError(
            "Horovod must have been built for this TensorFlow. Received: TensorFlow "
            f"{tf.__version__}, and {error}. Run `tfdist horovod build --force`."
        ) from error
    sets = _sets(hvd, groups, cluster.num_workers)
    if sets and hvd.is_initialized():
        # Sets can be added later only at the price of one exchange more in every cycle.
        hvd.shutdown()
    if not hvd.is_initialized():
        try:
            hvd.init(process_sets=sets)
        except (RuntimeError, ValueError) as error:
            raise StrategyError(
                f"All {cluster.num_workers} ranks must connect. Received: rank {cluster.index} "
                f"could not: {error}. See the output of the other ranks."
            ) from error
    if hvd.size() != cluster.num_workers:
        raise StrategyError(
            f"Horovod must connect all ranks that {cluster.source} started. Received: "
            f"{hvd.size()} connected of {cluster.num_workers}. Horovod was built without "
            "support for this launcher: use `horovodrun --gloo` or `tfdist run`, or build it "
            "with HOROVOD_WITH_MPI=1 tfdist horovod build --force."
        )
    gpus = tf.config.list_physical_devices("GPU")
    if len(gpus) > 1:
        # A `tfdist run` that started all ranks of this machine has shared the GPUs out;
        # otherwise each rank may see all of them.
        is_shared = os.environ.get("TFDIST_LOCAL_SIZE") == str(hvd.local_size())
        local = 0 if is_shared else hvd.local_rank() % len(gpus)
        try:
            tf.config.set_visible_devices(gpus[local], "GPU")
        except RuntimeError as error:
            raise StrategyError(
                "A rank must choose its GPU before TensorFlow uses one. Received: TensorFlow "
                "in use already. Call tfdist.init() right after the imports."
            ) from error
    return hvd, next((one for one in sets if one.included()), hvd.global_process_set)
