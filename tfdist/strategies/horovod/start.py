"""Starts Horovod on a rank: connects it, makes process sets, listens for new hosts."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from tfdist.cluster import Cluster
from tfdist.errors import ArgumentError, StrategyError


class HostListener:
    """The listener that Horovod's notification service calls."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        self._on_change = on_change

    def on_hosts_updated(self, timestamp: float, update: int) -> None:
        """Passes the call on."""
        self._on_change()


def _process_sets(hvd: Any, groups: Sequence[Sequence[int]], ranks: int) -> list[Any]:
    """Makes a process set for each group of ranks, or none if all ranks are one group."""
    all_ranks = sorted(rank for group in groups for rank in group)
    if groups and all_ranks != list(range(ranks)):
        raise ArgumentError(
            f"`process_sets` must name each of {ranks} ranks once. Received: "
            f"process_sets={[list(group) for group in groups]}."
        )
    return [hvd.ProcessSet(list(group)) for group in groups] if len(groups) > 1 else []


def _check_own_name() -> None:
    """Refuses a machine whose own name resolves to an address of this machine alone.

    A Horovod that was not built by `tfdist horovod build`, or by an earlier one, connects
    process sets by the address of this name, and ends by SIGABRT.
    """
    import horovod

    is_on_one_machine = os.environ.get("HOROVOD_GLOO_IFACE", "lo") in ("lo", "lo0")
    if is_on_one_machine or hasattr(horovod, "keeps_to_interface"):
        return
    name = socket.gethostname()
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(name)
        if address.startswith("127."):
            raise StrategyError(
                "A machine's own name must resolve to an address that the other machines can "
                f"reach. Received: {name!r} at {address}. Run `tfdist horovod build` on it "
                "again, which makes a Horovod that does not need that, or give the name "
                "another address in /etc/hosts."
            )


def start(cluster: Cluster, groups: Sequence[Sequence[int]]) -> tuple[Any, Any]:
    """Imports Horovod, connects the ranks and gives this one a GPU of its own.

    Args:
        cluster: The cluster of the ranks.
        groups: The ranks of each group that trains on its own. Empty if all train together.

    Returns:
        The module `horovod.tensorflow`, and the process set of this rank.
    """
    try:
        import horovod.tensorflow as hvd
    except (ImportError, tf.errors.NotFoundError) as error:
        raise StrategyError(
            "Horovod must have been built for this TensorFlow. Received: TensorFlow "
            f"{tf.__version__}, and {error}. Run `tfdist horovod build --force`."
        ) from error
    process_sets = _process_sets(hvd, groups, cluster.num_workers)
    if process_sets and hvd.is_initialized():
        # Horovod can add sets later too, but then needs one exchange more in every cycle.
        hvd.shutdown()
    if not hvd.is_initialized():
        _check_own_name()
        try:
            hvd.init(process_sets=process_sets)
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
        # If `tfdist run` started all ranks of this machine, it has assigned the GPUs to them
        # already. Otherwise each rank may see all GPUs.
        is_assigned = os.environ.get("TFDIST_LOCAL_SIZE") == str(hvd.local_size())
        index = 0 if is_assigned else hvd.local_rank() % len(gpus)
        try:
            tf.config.set_visible_devices(gpus[index], "GPU")
        except RuntimeError as error:
            raise StrategyError(
                "A rank must choose its GPU before TensorFlow uses one. Received: TensorFlow "
                "in use already. Call tfdist.init() right after the imports."
            ) from error
    return hvd, next((each for each in process_sets if each.included()), hvd.global_process_set)
