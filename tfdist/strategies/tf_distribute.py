"""Strategies built on `tf.distribute`, and the wrapper of an instance that the user passes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfdist import _keras
from tfdist.cluster import Cluster
from tfdist.cluster.key_value_store import KeyValueStore
from tfdist.errors import StrategyError
from tfdist.strategies.base import Groups, Place, Tensor
from tfdist.strategies.connected import Connected
from tfdist.strategies.coordination_store import CoordinationStore
from tfdist.strategies.mirrored_variables import MirroredVariables
from tfdist.strategies.packing import reduce_packed
from tfdist.watchdog.timeouts import WaitLimit

# TensorFlow's own classes: in a script, tfdist may put others in their place.
MirroredStrategy = tf.distribute.MirroredStrategy
MultiWorkerMirroredStrategy = tf.distribute.MultiWorkerMirroredStrategy
ParameterServerStrategy = tf.distribute.ParameterServerStrategy
ClusterCoordinator = tf.distribute.coordinator.ClusterCoordinator

_WORDS = tf.TensorSpec([None], tf.int32)
# Larger packs need more memory, smaller ones more time (docs/performance.md).
PACK_BYTES = 2**22
# Elements of all gradients. Above this size, a gradient is used and freed while others are
# still being reduced, which saves more than the separate collective of the signals costs.
SIGNALS_LEAD = 2**24
_CHUNK = 2**22  # int32 words of one collective: 16 MiB


class TFDistribute(Connected):
    """Runs replicas through a `tf.distribute.Strategy`.

    tf.distribute supplies the replicas' threads, the collectives and the transfer of input
    to the devices. Its own rules for gradients, variables and losses are not used. Every
    variable is a mirrored variable without aggregation, so an assignment is local to its
    replica. The copies stay equal because every replica assigns the same reduced values.

    Args:
        strategy: The `tf.distribute.Strategy` instance.
        place: The replicas of this process.
        wait_limit: Limits how long this process waits for its peers.
        store: The key-value store of the workers.
    """

    name = "tf.distribute"

    def __init__(
        self,
        strategy: Any,
        place: Place,
        wait_limit: WaitLimit | None = None,
        store: KeyValueStore | None = None,
    ) -> None:
        super().__init__(wait_limit)
        self.strategy = strategy
        self.place = place
        self._store = store

    @classmethod
    def unavailable(cls, cluster: Cluster) -> str | None:
        """Returns None: the user who made the instance has chosen it."""
        return None

    def key_value_store(self) -> KeyValueStore | None:
        """Returns the key-value store of several workers that TensorFlow connects."""
        return self._store

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Runs `function` once on every local replica, returning the first one's result."""
        result = self.strategy.run(function, args=args)
        return tf.nest.map_structure(
            lambda value: self.strategy.experimental_local_results(value)[0], result
        )

    def replica_id(self) -> Tensor:
        """The global index of the running replica."""
        return tf.distribute.get_replica_context().replica_id_in_sync_group

    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sums each tensor over all replicas, small tensors together in one collective."""
        if self.place.num_replicas == 1:
            return list(tensors)
        context = tf.distribute.get_replica_context()
        return reduce_packed(
            tensors,
            lambda tensor: context.all_reduce("SUM", tensor),
            pack_bytes=PACK_BYTES,
        )

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Concatenates a tensor of every replica along axis 0."""
        if self.place.num_replicas == 1:
            return tensor
        return tf.distribute.get_replica_context().all_gather(tensor, axis=0)

    def signals_lead(self, elements: int) -> bool:
        """Reduces the signals first if the gradients are very large."""
        return elements > SIGNALS_LEAD

    def sum_in_groups(self, groups: Groups, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sums each tensor over the replicas of a group. Only traced functions can do it."""
        return reduce_packed(
            tensors,
            lambda tensor: self._group_collectives.sum(tensor, groups),
            pack_bytes=PACK_BYTES,
        )

    def gather_in_groups(self, groups: Groups, tensor: Tensor) -> Tensor:
        """Concatenates a tensor of a group's replicas. Only traced functions can do it."""
        return self._group_collectives.gather(tensor, groups)

    def sum_of_part(self, stacked: Tensor) -> Tensor:
        """Sums a tensor; each replica gets its row. Only traced functions can do it."""
        # The collectives of CPUs have no reduce-scatter. An all-to-all moves as many bytes.
        received = self._group_collectives.all_to_all(stacked, self.everyone)
        return tf.reduce_sum(received, 0)

    def gather_parts(self, part: Tensor) -> Tensor:
        """Stacks a tensor of every replica. Only traced functions can do it."""
        return self._group_collectives.gather_equal(part[None], self.everyone)

    def stack_in_groups(self, groups: Groups, part: Tensor) -> Tensor:
        """Stacks a tensor of a group's replicas. Only traced functions can do it."""
        return self._group_collectives.gather_equal(part[None], groups)

    def swap_in_groups(self, groups: Groups, stacked: Tensor) -> Tensor:
        """Sends rows to the replicas of a group. Only traced functions can do it."""
        return self._group_collectives.all_to_all(stacked, groups)

    @functools.cached_property
    def _group_collectives(self) -> Any:
        return _keras.GroupCollectives(self.strategy, self.place.first_replica)

    def distribute(self, dataset: Callable[[], Any]) -> Iterable[Any]:
        """Distributes per-replica batches to the local replicas and their devices."""
        if self.place.local_replicas == 1:
            batches: Iterable[Any] = dataset()
            return batches
        distributed: Iterable[Any] = self.strategy.distribute_datasets_from_function(
            lambda _: dataset()
        )
        return distributed

    def hold(
        self, variables: Sequence[Any], optimizers: Sequence[Any]
    ) -> contextlib.AbstractContextManager[None]:
        """Mirrors variables if the process has several replicas."""
        if self.place.local_replicas == 1:
            return contextlib.nullcontext()
        return MirroredVariables(self.strategy, variables, optimizers)

    def make_variable(self, value: Tensor, name: str, trainable: bool = False) -> Any:
        """Makes a variable with a copy on each device of this process."""
        if self.place.local_replicas == 1:
            return super().make_variable(value, name, trainable)
        with self.strategy.scope():
            return tf.Variable(
                value, trainable=trainable, name=name, aggregation=tf.VariableAggregation.NONE
            )

    def local_tensors(self, variable: Any) -> list[Tensor]:
        """Returns the value of a variable on each device of this process."""
        local_values = self.strategy.experimental_local_results(variable.value)
        return [tf.convert_to_tensor(value) for value in local_values]

    def assign_copies(self, variable: Any, values: Sequence[Any]) -> None:
        """Assigns a value of its own to each device of this process."""
        mirrored = _keras.backing_variable(variable)
        local_variables = self.strategy.experimental_local_results(mirrored)
        for local_variable, value in zip(local_variables, values, strict=True):
            local_variable.assign(value)

    def broadcast_bytes(self, content: bytes) -> bytes:
        """Returns the chief's bytes on every worker."""
        words = np.frombuffer(content + bytes(-len(content) % 4), np.int32)
        received = [
            self._broadcast_words(tf.constant(words[start : start + _CHUNK])).numpy()
            for start in range(0, len(words), _CHUNK)
        ]
        return np.concatenate(received).tobytes()[: len(content)]

    @functools.cached_property
    def _broadcast_words(self) -> Callable[[Tensor], Tensor]:
        def on_replicas(words: Tensor) -> Tensor:
            def on_replica() -> Tensor:
                is_first = tf.equal(self.replica_id(), 0)
                # tf.distribute has no public broadcast, so all others add zeros.
                return self.all_reduce_sum([tf.where(is_first, words, tf.zeros_like(words))])[0]

            return self.run(on_replica)

        broadcast: Callable[[Tensor], Tensor]
        broadcast = tf.function(on_replicas, [_WORDS], autograph=False)
        return broadcast

    @functools.cached_property
    def _gather_words(self) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        # Workers have payloads of different sizes, so the sizes are gathered too, to split the
        # concatenation of all payloads.
        def on_replicas(payload: Tensor) -> tuple[Tensor, Tensor]:
            def on_replica() -> tuple[Tensor, Tensor]:
                # Only the first replica of a worker sends; the others send no rows.
                is_first = tf.equal(self.replica_id() % self.place.local_replicas, 0)
                words = payload[: tf.where(is_first, tf.size(payload), 0)]
                return self.all_gather(tf.shape(words)), self.all_gather(words)

            result: tuple[Tensor, Tensor] = self.run(on_replica)
            return result

        gather: Callable[[Tensor], tuple[Tensor, Tensor]]
        gather = tf.function(on_replicas, [_WORDS], autograph=False)
        return gather

    def gather_bytes(self, content: bytes) -> list[bytes]:
        """Collects the bytes of every worker, in two collectives."""
        words = np.frombuffer(content, np.uint8).astype(np.int32)
        sizes, payloads = (t.numpy() for t in self._gather_words(tf.constant(words)))
        parts = np.split(payloads, np.cumsum([size for size in sizes if size])[:-1])
        return [part.astype(np.uint8).tobytes() for part in parts]


def require_unused_tensorflow(cluster: Cluster) -> None:
    """Checks that TensorFlow has not created its devices yet, and can still connect.

    Args:
        cluster: The process's place.

    Raises:
        StrategyError: It is too late.
    """
    if not _keras.has_devices():
        return
    if tf.distribute.has_strategy():
        scope = type(tf.distribute.get_strategy()).__name__
        state = f"in the scope of a {scope} that was made"
        remedy = (
            "With spark-tensorflow-distributor, make the MirroredStrategyRunner with "
            "use_custom_strategy=True, and let the function begin with tfdist.init(). "
            "Elsewhere call tfdist.init() before that strategy is made, or use it: "
            "tfdist.init(strategy=tf.distribute.get_strategy())."
        )
    else:
        state = "with TensorFlow in use"
        remedy = (
            "Call tfdist.init() right after the imports (in a function that a scheduler runs, "
            "as its first line), or start the script with `tfdist run`, which does that."
        )
    raise StrategyError(
        "In a process of a cluster tfdist must connect to the others before TensorFlow "
        "does anything else. Building a model counts too. "
        f"Received: a cluster of {cluster.num_workers} workers from {cluster.source}, "
        f"{state} already. {remedy}"
    )


def adopt(strategy: Any) -> TFDistribute:
    """Wraps a `tf.distribute.Strategy` instance that the user made.

    Args:
        strategy: The instance.

    Returns:
        The strategy. Its `place` follows from the instance's cluster.

    Raises:
        StrategyError: It is not a synchronous `tf.distribute.Strategy`.
    """
    is_tf_strategy = isinstance(strategy, tf.distribute.Strategy)
    if not is_tf_strategy or isinstance(strategy, ParameterServerStrategy):
        raise StrategyError(
            "`strategy` must be a name or a synchronous tf.distribute.Strategy. Received: "
            f"strategy={strategy!r}. For parameter servers use strategy='parameter_server'."
        )
    replicas = strategy.num_replicas_in_sync
    local = len(strategy.extended.worker_devices)
    resolver = strategy.cluster_resolver
    # An instance of several workers has more replicas than devices in this process.
    workers, index = 1, 0
    if replicas != local:
        workers = replicas // local
        index = _worker_index(resolver)
    place = Place(replicas, index * local, local, workers, index)
    return TFDistribute(strategy, place, store=CoordinationStore.of_this_process(workers))


def _worker_index(resolver: Any) -> int:
    jobs = resolver.cluster_spec().as_dict()
    chiefs = len(jobs.get("chief", ()))
    return int(resolver.task_id) + (chiefs if resolver.task_type == "worker" else 0)
