"""What the strategies built on `tf.distribute` share, and any instance a user passes."""

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
from tfdist.strategies.base import Place, Tensor
from tfdist.strategies.connected import Connected
from tfdist.strategies.coordination_store import CoordinationStore
from tfdist.strategies.packing import reduce_packed
from tfdist.watchdog.timeouts import WaitLimit

# As TensorFlow has them, whatever a script gets in their place.
MirroredStrategy = tf.distribute.MirroredStrategy
MultiWorkerMirroredStrategy = tf.distribute.MultiWorkerMirroredStrategy
ParameterServerStrategy = tf.distribute.ParameterServerStrategy
ClusterCoordinator = tf.distribute.coordinator.ClusterCoordinator

_WORDS = tf.TensorSpec([None], tf.int32)
_CHUNK = 2**22  # int32 words that travel at once: 16 MiB


class TFDistribute(Connected):
    """Runs replicas through a `tf.distribute.Strategy`.

    tf.distribute supplies the replicas' threads, the collectives and the input's way to
    the devices. Its own rules for gradients, variables and losses are not used: every
    variable is a mirrored one that aggregates nothing, so that a replica's assignment is
    local, and equality follows from equal, explicitly reduced inputs.

    Args:
        strategy: The `tf.distribute.Strategy` instance.
        place: Where this process's replicas stand.
        wait_limit: Limits this process's waits for the others.
        key-value store: Where workers leave notes.
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
        """Says why not: whoever made the instance knows."""
        return None

    def key_value_store(self) -> KeyValueStore | None:
        """Gives the key-value store of several workers that TensorFlow connects."""
        return self._store

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Runs `function` once on every local replica, returning the first one's result."""
        result = self.strategy.run(function, args=args)
        return tf.nest.map_structure(
            lambda value: self.strategy.experimental_local_results(value)[0], result
        )

    def replica_id(self) -> Tensor:
        """The global number of the replica that is running."""
        return tf.distribute.get_replica_context().replica_id_in_sync_group

    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sums each tensor over all replicas; dense ones travel together, by dtype."""
        if self.place.num_replicas == 1:
            return list(tensors)
        context = tf.distribute.get_replica_context()
        return reduce_packed(tensors, lambda tensor: context.all_reduce("SUM", tensor))

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Concatenates a tensor of every replica along axis 0."""
        if self.place.num_replicas == 1:
            return tensor
        return tf.distribute.get_replica_context().all_gather(tensor, axis=0)

    def distribute(self, dataset: Callable[[], Any]) -> Iterable[Any]:
        """Deals shares out to the local replicas, prefetching to their devices."""
        if self.place.local_replicas == 1:
            made: Iterable[Any] = dataset()
            return made
        distributed: Iterable[Any] = self.strategy.distribute_datasets_from_function(
            lambda _: dataset()
        )
        return distributed

    def hold(
        self, variables: Sequence[Any], optimizers: Sequence[Any]
    ) -> contextlib.AbstractContextManager[None]:
        """Mirrors variables when the process has several replicas, leaves them otherwise."""
        if self.place.local_replicas == 1:
            return contextlib.nullcontext()
        return MirroredVariables(self.strategy, variables, optimizers)

    def copies(self, variable: Any) -> list[Any]:
        """Gives the values of a variable on each device of this process."""
        held = self.strategy.experimental_local_results(variable.value)
        return [np.asarray(value) for value in held]

    def assign_copies(self, variable: Any, values: Sequence[Any]) -> None:
        """Gives each device of this process a value of its own."""
        held = self.strategy.experimental_local_results(_keras.backing_variable(variable))
        for copy, value in zip(held, values, strict=True):
            copy.assign(value)

    def broadcast_bytes(self, content: bytes) -> bytes:
        """Gives every worker the chief's bytes."""
        words = np.frombuffer(content + bytes(-len(content) % 4), np.int32)
        received = [
            self._broadcast_words(tf.constant(words[start : start + _CHUNK])).numpy()
            for start in range(0, len(words), _CHUNK)
        ]
        return np.concatenate(received).tobytes()[: len(content)]

    @functools.cached_property
    def _broadcast_words(self) -> Callable[[Tensor], Tensor]:
        def on_replicas(words: Tensor) -> Tensor:
            def one() -> Tensor:
                is_first = tf.equal(self.replica_id(), 0)
                # There is no broadcast among tf.distribute's public collectives.
                return self.all_reduce_sum([tf.where(is_first, words, tf.zeros_like(words))])[0]

            return self.run(one)

        broadcast: Callable[[Tensor], Tensor]
        broadcast = tf.function(on_replicas, [_WORDS], autograph=False)
        return broadcast

    @functools.cached_property
    def _gather_words(self) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        def on_replicas(payload: Tensor) -> tuple[Tensor, Tensor]:
            def one() -> tuple[Tensor, Tensor]:
                # One copy a worker: its first replica's.
                is_first = tf.equal(self.replica_id() % self.place.local_replicas, 0)
                sent = payload[: tf.where(is_first, tf.size(payload), 0)]
                return self.all_gather(tf.shape(sent)), self.all_gather(sent)

            result: tuple[Tensor, Tensor] = self.run(one)
            return result

        gather: Callable[[Tensor], tuple[Tensor, Tensor]]
        gather = tf.function(on_replicas, [_WORDS], autograph=False)
        return gather

    def gather_bytes(self, content: bytes) -> list[bytes]:
        """Collects the bytes of every worker, in two collectives."""
        mine = np.frombuffer(content, np.uint8).astype(np.int32)
        sizes, payloads = (t.numpy() for t in self._gather_words(tf.constant(mine)))
        parts = np.split(payloads, np.cumsum([size for size in sizes if size])[:-1])
        return [part.astype(np.uint8).tobytes() for part in parts]


class MirroredVariables(contextlib.AbstractContextManager[None]):
    """Moves variables to all devices of a process, and back.

    While inside, a `keras.Variable` holds one copy on each device and a replica reads and
    assigns its own. The plain `tf.Variable`s stay what they are, so what was traced with
    them, in and outside of the context, goes on working.

    Args:
        strategy: A `tf.distribute.Strategy` with several devices in this process.
        variables: `keras.Variable`s.
        optimizers: The optimizers among whose variables they are.
    """

    def __init__(
        self, strategy: Any, variables: Sequence[Any], optimizers: Sequence[Any]
    ) -> None:
        self._strategy = strategy
        self._variables = variables
        self._optimizers = optimizers
        self._strategies: dict[Any, Any] = {}
        self._elsewhere: list[Any] = []  # the copies that are not in use

    def __enter__(self) -> None:
        if self._elsewhere:
            for variable, mirrored in zip(self._variables, self._elsewhere, strict=True):
                mirrored.assign(variable.value)
        else:
            self._elsewhere = [self._mirror(variable) for variable in self._variables]
        self._swap()

    def __exit__(self, *_: object) -> None:
        self._swap()
        for variable, mirrored in zip(self._variables, self._elsewhere, strict=True):
            variable.assign(self._strategy.experimental_local_results(mirrored)[0])

    def _swap(self) -> None:
        self._elsewhere = [
            _keras.swap_value(variable, other)
            for variable, other in zip(self._variables, self._elsewhere, strict=True)
        ]
        for optimizer in self._optimizers:
            _keras.reindex_optimizer(optimizer)
            # What a callback assigns, it assigns through it.
            self._strategies[optimizer] = _keras.swap_strategy(
                optimizer, self._strategies.get(optimizer, self._strategy)
            )

    def _mirror(self, variable: Any) -> Any:
        with self._strategy.scope():
            return tf.Variable(
                tf.convert_to_tensor(variable),
                dtype=variable.dtype,
                trainable=variable.trainable,
                name=variable.name,
                aggregation=tf.VariableAggregation.NONE,
            )


def require_unused_tensorflow(cluster: Cluster) -> None:
    """Refuses to connect a process in which TensorFlow has made its devices already.

    Args:
        cluster: The process's place.

    Raises:
        StrategyError: It is too late.
    """
    if not _keras.has_devices():
        return
    if tf.distribute.has_strategy():
        found = f"in the scope of a {type(tf.distribute.get_strategy()).__name__} that was made"
        remedy = (
            "With spark-tensorflow-distributor, make the MirroredStrategyRunner with "
            "use_custom_strategy=True, and let the function begin with tfdist.init(). "
            "Elsewhere call tfdist.init() before that strategy is made, or use it: "
            "tfdist.init(strategy=tf.distribute.get_strategy())."
        )
    else:
        found = "with TensorFlow in use"
        remedy = (
            "Call tfdist.init() right after the imports (in a function that a scheduler runs, "
            "as its first line), or start the script with `tfdist run`, which does that."
        )
    raise StrategyError(
        "In a process of a cluster tfdist must connect to the others before TensorFlow "
        "does anything else (building a model is something). "
        f"Received: a cluster of {cluster.num_workers} workers from {cluster.source}, "
        f"{found} already. {remedy}"
    )


def adopt(strategy: Any) -> TFDistribute:
    """Wraps a `tf.distribute.Strategy` instance that the user made.

    Args:
        strategy: The instance.

    Returns:
        A strategy with the place that the instance implies.

    Raises:
        StrategyError: It is not a synchronous `tf.distribute.Strategy`.
    """
    unfit = ParameterServerStrategy
    if not isinstance(strategy, tf.distribute.Strategy) or isinstance(strategy, unfit):
        raise StrategyError(
            "`strategy` must be a name or a synchronous tf.distribute.Strategy. Received: "
            f"strategy={strategy!r}. For parameter servers use strategy='parameter_server'."
        )
    replicas = strategy.num_replicas_in_sync
    local = len(strategy.extended.worker_devices)
    resolver = strategy.cluster_resolver
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
