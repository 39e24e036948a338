"""Collectives of tf.distribute among some of the replicas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf
from tensorflow.python.distribute.cross_device_utils import (
    CollectiveKeys,
    CollectiveReplicaLauncher,
)
from tensorflow.python.ops.collective_ops import all_to_all_v2

from tfdist.errors import StrategyError

Tensor = Any
_FIRST_KEY = 2**24  # TensorFlow numbers the groups of its strategies from 1 upwards


class GroupCollectives:
    """Sums and gathers among groups of replicas of one strategy.

    TensorFlow matches collectives by a key of the group and by their number in it. All
    processes make the same groups in the same order, so they number them alike.

    All collectives of a device share the ordering token of the strategy's own. Two devices
    that began collectives of two groups in different orders would wait for each other forever.

    Args:
        strategy: A `tf.distribute.Strategy` that reduces by collective operations.
        first_replica: Global index of the first replica of this process.

    Raises:
        StrategyError: The strategy has no collective operations.
    """

    def __init__(self, strategy: Any, first_replica: int) -> None:
        extended = strategy.extended
        collectives = getattr(extended, "_collective_ops", None) or extended._cross_device_ops
        if not hasattr(collectives, "_launchers"):
            raise StrategyError(
                "A strategy must have collective operations between its devices. Received: "
                f"{type(strategy).__name__} with {type(collectives).__name__}. Make it without "
                "the argument `cross_device_ops`."
            )
        self._own_launchers = collectives._launchers
        self._first_replica = first_replica
        self._next_key = _FIRST_KEY
        self._launchers: dict[Any, list[Any]] = {}

    def sum(self, tensor: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
        """Sums a tensor over the group of the running replica.

        Args:
            tensor: Dense, or `tf.IndexedSlices`.
            groups: The global indices of each group's replicas.
        """
        launcher = self._launcher(groups)
        if isinstance(tensor, tf.IndexedSlices):
            return launcher.all_reduce_indexed_slices(tensor)
        return launcher.all_reduce(tensor)

    def gather(self, tensor: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
        """Concatenates a tensor of every replica of the running replica's group, on axis 0.

        Args:
            tensor: Shape [rows, ...]; `rows` may differ between replicas.
            groups: As in `sum`.
        """
        return self._launcher(groups).all_gather(tensor, 0)

    def all_to_all(self, tensor: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
        """Sends each row of a tensor to one replica of the running replica's group.

        Args:
            tensor: Shape [size of the group, ...], the same on all replicas.
            groups: As in `sum`.

        Returns:
            The rows that the replica has received, in the senders' order.
        """
        launcher = self._launcher(groups)
        options = launcher._options
        key, token = launcher._next_instance_key(), launcher._get_ordering_token()
        with tf.device(launcher._device):
            return all_to_all_v2(
                tensor,
                launcher._group_size,
                launcher._group_key,
                key,
                communication_hint=options.implementation.value,
                timeout=options.timeout_seconds,
                ordering_token=token,
            )

    def gather_equal(self, tensor: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
        """Concatenates a tensor of the same shape on every replica of the group, on axis 0.

        Args:
            tensor: Shape [rows, ...].
            groups: As in `sum`.
        """
        if tensor.dtype == tf.bfloat16:  # CPUs cannot gather it
            gathered = self.gather_equal(tf.bitcast(tensor, tf.float16), groups)
            return tf.bitcast(gathered, tf.bfloat16)
        return self._launcher(groups)._all_gather(tensor, None)

    def _launcher(self, groups: Sequence[Sequence[int]]) -> Any:
        key = tuple(map(tuple, groups))
        # All processes trace the same steps, so they make the groups in the same order.
        if key not in self._launchers:
            self._launchers[key] = self._make(key)
        replica = tf.distribute.get_replica_context()._replica_id_in_sync_group
        return self._launchers[key][replica - self._first_replica]

    def _make(self, groups: tuple[tuple[int, ...], ...]) -> list[Any]:
        launchers = []
        for local, original in enumerate(self._own_launchers):
            (number,) = (n for n, g in enumerate(groups) if self._first_replica + local in g)
            keys = CollectiveKeys(self._next_key + number)
            launcher = CollectiveReplicaLauncher(
                keys.get_group_key([original._device]),
                len(groups[number]),
                keys,
                original._device,
                original._options,
            )
            launcher._ordering_token = original._ordering_token
            launchers.append(launcher)
        self._next_key += len(groups)
        return launchers
