"""The strategy `horovod`: ranks reduce with Horovod's collectives."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import tensorflow as tf

from tfdist.cluster import Cluster
from tfdist.cluster.key_value_store import KeyValueStore
from tfdist.errors import ArgumentError, PeerError, StrategyError
from tfdist.strategies.base import Place, Tensor
from tfdist.strategies.connected import Connected
from tfdist.strategies.horovod.start import HostListener, start
from tfdist.strategies.horovod.store import RendezvousStore
from tfdist.strategies.horovod.sums import adasum, sum_bf16
from tfdist.strategies.packing import reduce_packed
from tfdist.watchdog.timeouts import WaitLimit

_COMPRESSIONS = {None: None, "fp16": tf.float16, "bf16": tf.bfloat16}
# Elements. A larger tensor is reduced on its own: that overlaps with the backward pass and
# needs no copy. Smaller ones cost less in one collective (docs/performance.md).
_LARGEST_PACKED = 2**14
# Elements of all gradients. Above this size, updates that begin early save more time than the
# separate collective of the signals costs.
_SIGNALS_LEAD = 2**20
_OPS = ("average", "adasum")


class Horovod(Connected):
    """Runs one replica on each rank, on one GPU or the CPU. Horovod connects the ranks.

    `strategy="horovod"` makes an instance with the default options; pass an instance to
    choose others. They correspond to the arguments of Horovod's `DistributedOptimizer`. An
    option other than the default changes the weights: only plain sums give the weights of
    one process.

    Args:
        cluster: The cluster of this process. None reads it from the environment.
        op: "average", the exact mean over the examples of the global batch; or "adasum",
            which adds orthogonal gradients and averages parallel ones (Maleki et al.,
            "Scaling distributed training with adaptive summation", MLSys 2021).
        compression: None, "fp16" or "bf16": the type in which gradients are sent.
        gradient_predivide_factor: Gradients are divided by it before the sum, and the sum
            by `size / gradient_predivide_factor`, so that half precision does not overflow.
        sparse_as_dense: Whether gradients of embeddings are reduced as dense tensors rather
            than as gathered rows. This is faster for small tables. It changes the result of
            most Keras optimizers if a row occurs several times in a batch: they get one
            summed gradient for it instead of several.
        process_sets: Groups of ranks, the same on every rank. Each group trains on its own.
            None makes one group of all ranks.

    Raises:
        ArgumentError: An argument is invalid.
        StrategyError: Horovod cannot start.

    Example:
        >>> import tfdist  # doctest: +SKIP
        >>> tfdist.fit(model, x, y, strategy=tfdist.Horovod(compression="fp16"))
    """

    name = "horovod"
    priority = 40

    def __init__(
        self,
        cluster: Cluster | None = None,
        *,
        op: str = "average",
        compression: str | None = None,
        gradient_predivide_factor: float = 1.0,
        sparse_as_dense: bool = False,
        process_sets: Sequence[Sequence[int]] | None = None,
    ) -> None:
        _check(op, compression, gradient_predivide_factor)
        cluster = Cluster.from_environment() if cluster is None else cluster
        obstacle = self.unavailable(cluster)
        if obstacle is not None:
            raise StrategyError(f"Horovod must be able to run here. Received: {obstacle}.")
        self._hvd, self._process_set = start(cluster, process_sets or ())
        self._first_rank = self._process_set.ranks[0]
        self.elastic = os.environ.get("HOROVOD_ELASTIC") == "1"
        self._joined = not self.elastic
        self._take_place()
        self._op = op
        self._compressed_dtype = _COMPRESSIONS[compression]
        self.predivide = gradient_predivide_factor
        self.compression = compression if op == "average" else None
        self.sums_gradients = op == "average"
        self.sums_exactly = op == "average" and compression is None
        self._sparse_as_dense = sparse_as_dense
        size = self._process_set.size()
        self._store = RendezvousStore.from_environment(f"group-{self._first_rank}", size)
        number = self.place.worker_index
        super().__init__(
            WaitLimit.from_environment(f"rank {self._hvd.rank()}", self._store, number)
        )

    def _take_place(self) -> None:
        size, rank = self._process_set.size(), self._process_set.rank()
        self.place = Place(size, rank, 1, size, rank)

    def key_value_store(self) -> KeyValueStore | None:
        """Returns the key-value store of the ranks that train together, if there is one."""
        return self._store

    def join(self) -> None:
        """Begins the collectives with the other ranks, which call this too."""
        self._joined = True

    def reconnect(self) -> None:
        """Connects to the ranks that are there now."""
        self._joined = False
        # Horovod must begin again to learn who is there. Rank and size may be others then.
        self._hvd.shutdown()
        self._hvd.init()
        self._take_place()
        if self._store is not None:
            self._store.num_workers = self.place.num_workers

    @contextlib.contextmanager
    def members_watched(self, on_change: Callable[[], None]) -> Iterator[None]:
        """Listens to horovodrun: it tells when hosts have joined or will leave."""
        if not self.elastic:
            yield
            return
        from horovod.common.elastic import notification_manager

        listener = HostListener(on_change)
        notification_manager.init()
        notification_manager.register_listener(listener)
        try:
            yield
        finally:
            notification_manager.remove_listener(listener)

    def gather_objects(self, value: Any) -> list[Any]:
        """Collects an object of every rank. In an elastic run, ranks must `join` first."""
        return super().gather_objects(value) if self._joined else [value]

    @classmethod
    def unavailable(cls, cluster: Cluster) -> str | None:
        """Returns an obstacle if Horovod is not installed or did not start the ranks."""
        if find_spec("horovod") is None:
            return "Horovod is not installed: run `tfdist horovod build`"
        if cluster.has_parameter_servers:
            return "the cluster has parameter servers, which horovod does not use"
        if cluster.num_workers > 1 and not cluster.launched:
            return (
                f"{cluster.source} describes {cluster.num_workers} workers to TensorFlow, not "
                "to Horovod: start them with `tfdist run --strategy horovod` or `horovodrun`"
            )
        return None

    @classmethod
    def chosen_by(cls, cluster: Cluster) -> str | None:
        """Returns the reason for `auto`: horovodrun or mpirun started the processes."""
        if cluster.launched > 1:
            return f"{cluster.launched} ranks in {cluster.source}"
        return None

    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sums each tensor over all ranks. Small ones are packed, large ones are not."""
        return reduce_packed(tensors, self._sum, _LARGEST_PACKED)

    def reduce_step(
        self,
        gradients: Sequence[Tensor],
        exact_tensors: Sequence[Tensor],
        share: Tensor,
        variables: Sequence[Any],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Sums a step's tensors, the gradients as the constructor's arguments say."""
        if self._sparse_as_dense:
            gradients = [tf.convert_to_tensor(g) for g in gradients]
        if self._op == "average" and self.predivide == 1.0:
            return super().reduce_step(gradients, exact_tensors, share, variables)
        # Adasum depends on the directions of whole gradients, so they are not packed.
        if self._op == "adasum":
            reduced = [self._adasum(tf.convert_to_tensor(g), share) for g in gradients]
        else:
            reduced = reduce_packed(gradients, self._sum_gradient, _LARGEST_PACKED)
        return reduced, self.all_reduce_sum(exact_tensors)

    def signals_lead(self, elements: int) -> bool:
        """Reduces the signals first if the gradients are large."""
        return elements > _SIGNALS_LEAD

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Concatenates a tensor of every rank along axis 0."""
        if tensor.dtype == tf.bfloat16:  # Horovod does not support it
            return tf.bitcast(self.all_gather(tf.bitcast(tensor, tf.uint16)), tf.bfloat16)
        return self._hvd.allgather(tensor, process_set=self._process_set)

    def sum_of_part(self, stacked: Tensor) -> Tensor:
        """Sums a tensor; each rank gets its row.

        Horovod's own reduce-scatter is not used: on Gloo it corrupts tensors of 8 MiB and more.
        """
        received = self._all_to_all(tf.reshape(stacked, [-1]))
        return tf.reduce_sum(tf.reshape(received, tf.shape(stacked)), 0)

    @contextlib.contextmanager
    def waiting_for(self, what: str) -> Iterator[None]:
        """Limits a wait for the other ranks, and explains an error of Horovod."""
        try:
            with super().waiting_for(what):
                yield
        except tf.errors.OpError as error:
            if "Horovod" not in error.message:
                raise
            raise PeerError(
                f"All ranks must live until training ends. Received: rank "
                f"{self.place.worker_index} lost another in {what}. The launcher says which "
                f"rank ended first, and that rank's output says why."
            ) from None

    def broadcast_bytes(self, content: bytes) -> bytes:
        """Returns the first rank's bytes on every rank."""
        array = self._broadcast(tf.constant(np.frombuffer(content, np.uint8))).numpy()
        return bytes(array)

    def gather_bytes(self, content: bytes) -> list[bytes]:
        """Collects the bytes of every rank."""
        array = tf.constant(np.frombuffer(content, np.uint8))
        sizes, payloads = (t.numpy() for t in self._gather(array))
        return [part.tobytes() for part in np.split(payloads, np.cumsum(sizes)[:-1])]

    # Ranks match collectives by name, and an eager collective has no name of its own. So
    # these are traced.

    @functools.cached_property
    def _broadcast(self) -> Callable[[Tensor], Tensor]:
        traced: Callable[[Tensor], Tensor] = tf.function(
            lambda content: self._hvd.broadcast(
                content, self._first_rank, process_set=self._process_set
            ),
            [tf.TensorSpec([None], tf.uint8)],
            autograph=False,
        )
        return traced

    @functools.cached_property
    def _gather(self) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        traced: Callable[[Tensor], tuple[Tensor, Tensor]] = tf.function(
            lambda content: (self.all_gather(tf.shape(content)), self.all_gather(content)),
            [tf.TensorSpec([None], tf.uint8)],
            autograph=False,
        )
        return traced

    def _sum(self, tensor: Tensor, before: float = 1.0, after: float = 1.0) -> Tensor:
        if isinstance(tensor, tf.IndexedSlices):
            return tf.IndexedSlices(
                self.all_gather(tensor.values),
                self.all_gather(tensor.indices),
                tensor.dense_shape,
            )
        if tensor.dtype == tf.bfloat16:
            return sum_bf16(tensor, self.place.num_replicas, self._all_to_all, self.all_gather)
        return self._hvd.allreduce(
            tensor,
            op=self._hvd.Sum,
            prescale_factor=before,
            postscale_factor=after,
            process_set=self._process_set,
        )

    def _sum_gradient(self, gradient: Tensor) -> Tensor:
        """Sums a gradient over the ranks, with the predivide factor."""
        if isinstance(gradient, tf.IndexedSlices):
            return self._sum(gradient)
        if gradient.dtype in (tf.float16, tf.bfloat16):  # `HalfExchange` has divided it
            return self._sum(gradient)
        # A gradient is a rank's part of the mean already. Times the size, it is what Horovod
        # would get, and both factors are Horovod's.
        size = float(self.place.num_replicas)
        return self._sum(gradient, size / self.predivide, self.predivide / size)

    def _all_to_all(self, tensor: Tensor) -> Tensor:
        """Sends an equal part of a vector to each rank."""
        sizes = tf.fill([self.place.num_replicas], tf.size(tensor) // self.place.num_replicas)
        if tensor.dtype == tf.bfloat16:  # Horovod does not support it
            return tf.bitcast(self._all_to_all(tf.bitcast(tensor, tf.uint16)), tf.bfloat16)
        received, _ = self._hvd.alltoall(tensor, sizes, process_set=self._process_set)
        return received

    def _adasum(self, gradient: Tensor, share: Tensor) -> Tensor:
        mean = tf.math.divide_no_nan(gradient, tf.cast(share, gradient.dtype))
        compressed = tf.cast(mean, self._compressed_dtype or gradient.dtype)
        combined = adasum(compressed, self.place.num_replicas, self.all_gather)
        return tf.cast(combined, gradient.dtype)


def _check(op: str, compression: str | None, predivide: float) -> None:
    if op not in _OPS:
        raise ArgumentError(f"`op` must be one of {_OPS}. Received: op={op!r}.")
    if compression not in _COMPRESSIONS:
        raise ArgumentError(
            f"`compression` must be None, 'fp16' or 'bf16'. Received: {compression!r}."
        )
    if not predivide > 0:
        raise ArgumentError(
            "`gradient_predivide_factor` must be above 0. Received: "
            f"gradient_predivide_factor={predivide!r}."
        )
    if op == "adasum" and predivide != 1.0:
        raise ArgumentError(
            "`gradient_predivide_factor` must be 1 with op='adasum', which does not average. "
            f"Received: gradient_predivide_factor={predivide!r}."
        )
