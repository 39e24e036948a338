"""Processes that Horovod connects: its collectives, never its Keras layer."""

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
from tfdist.strategies.horovod.start import HostListener, started
from tfdist.strategies.horovod.store import RendezvousBoard
from tfdist.strategies.horovod.sums import adasum, sum_bf16
from tfdist.strategies.packing import reduce_packed
from tfdist.watchdog.timeouts import WaitLimit

_COMPRESSIONS = {None: None, "fp16": tf.float16, "bf16": tf.bfloat16}
# Elements. Larger tensors overlap with the backward pass and need no copy; smaller ones cost
# less in one collective than in many (docs/performance.md).
_LARGEST_PACKED = 2**14
# Elements of all gradients, above which updates that begin early save more than the signals'
# own collective costs.
_SIGNALS_LEAD = 2**20
_OPS = ("average", "adasum")


class Horovod(Connected):
    """One replica a rank, on one GPU or the processor; ranks exchange by Horovod.

    Made by `strategy="horovod"`; pass an instance to choose what Horovod's
    `DistributedOptimizer` has as arguments. Whatever is not the default below changes the
    weights: only plain sums equal one process's.

    Args:
        cluster: This process's place; read from the environment if None.
        op: "average", the exact mean over the examples of the global batch; or "adasum",
            which adds orthogonal gradients and averages parallel ones (Maleki et al.,
            "Scaling distributed training with adaptive summation", MLSys 2021).
        compression: None, "fp16" or "bf16": the type in which gradients travel.
        gradient_predivide_factor: Gradients are divided by it before the sum, and the sum
            by `size / gradient_predivide_factor`, so that half precision does not overflow.
        sparse_as_dense: Whether gradients of embeddings travel as dense tensors rather than
            as gathered rows. Faster for small tables; most optimizers of Keras treat the
            sum of a row that repeats within a batch otherwise than its parts.
        process_sets: Groups of ranks, the same on every rank; a rank trains with the group
            that it is in, and groups train apart. All ranks are one group if None.

    Raises:
        ArgumentError: An argument is none of these.
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
        self._hvd, self._process_set = started(cluster, process_sets or ())
        self._first_rank = self._process_set.ranks[0]
        self.elastic = os.environ.get("HOROVOD_ELASTIC") == "1"
        self._joined = not self.elastic
        self._take_place()
        self._op = op
        self._wire_type = _COMPRESSIONS[compression]
        self.predivide = gradient_predivide_factor
        self.compression = compression if op == "average" else None
        self.sums_gradients = op == "average"
        self.sums_exactly = op == "average" and compression is None
        self._sparse_as_dense = sparse_as_dense
        size = self._process_set.size()
        self._store = RendezvousBoard.from_environment(f"group-{self._first_rank}", size)
        number = self.place.worker_index
        super().__init__(
            WaitLimit.from_environment(f"rank {self._hvd.rank()}", self._store, number)
        )

    def _take_place(self) -> None:
        size, rank = self._process_set.size(), self._process_set.rank()
        self.place = Place(size, rank, 1, size, rank)

    def key_value_store(self) -> KeyValueStore | None:
        """Gives the key-value store of the ranks that train together; `mpirun` has none."""
        return self._store

    def join(self) -> None:
        """Begins to exchange with the other ranks, which do the same."""
        self._joined = True

    def reconnect(self) -> None:
        """Meets the ranks that are there now."""
        self._joined = False
        self._hvd.shutdown()
        self._hvd.init()
        self._take_place()
        if self._store is not None:
            self._store.num_workers = self.place.num_workers

    @contextlib.contextmanager
    def members_watched(self, on_change: Callable[[], None]) -> Iterator[None]:
        """Hears from horovodrun that hosts came or are about to go."""
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
        """Collects an object of every rank; of an elastic run's, once they have joined."""
        return super().gather_objects(value) if self._joined else [value]

    @classmethod
    def unavailable(cls, cluster: Cluster) -> str | None:
        """Says why not: Horovod is not installed, or nothing started several ranks."""
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
        """Says why `auto` chooses it: horovodrun or mpirun started the processes."""
        if cluster.launched > 1:
            return f"{cluster.launched} ranks in {cluster.source}"
        return None

    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sums each tensor over all ranks; large ones leave as soon as they are known."""
        return reduce_packed(tensors, self._sum, _LARGEST_PACKED)

    def reduce_step(
        self,
        gradients: Sequence[Tensor],
        others: Sequence[Tensor],
        share: Tensor,
        variables: Sequence[Any],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Sums a step's tensors; gradients as the arguments say."""
        if self._sparse_as_dense:
            gradients = [tf.convert_to_tensor(g) for g in gradients]
        if self._op == "average" and self.predivide == 1.0:
            return super().reduce_step(gradients, others, share, variables)
        if self._op == "adasum":
            reduced = [self._adasum(tf.convert_to_tensor(g), share) for g in gradients]
        else:
            reduced = reduce_packed(gradients, self._sum_gradient, _LARGEST_PACKED)
        return reduced, self.all_reduce_sum(others)

    def signals_lead(self, elements: int) -> bool:
        """Sends signals ahead of a step with many gradients."""
        return elements > _SIGNALS_LEAD

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Concatenates a tensor of every rank along axis 0."""
        if tensor.dtype == tf.bfloat16:  # which Horovod does not know
            return tf.bitcast(self.all_gather(tf.bitcast(tensor, tf.uint16)), tf.bfloat16)
        return self._hvd.allgather(tensor, process_set=self._process_set)

    @contextlib.contextmanager
    def waiting_for(self, what: str) -> Iterator[None]:
        """Limits a wait for the other ranks, and says what it means when Horovod gives up."""
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
        """Gives every rank the first one's bytes."""
        sent: bytes = self._broadcast(tf.constant(np.frombuffer(content, np.uint8))).numpy()
        return bytes(sent)

    def gather_bytes(self, content: bytes) -> list[bytes]:
        """Collects the bytes of every rank."""
        mine = tf.constant(np.frombuffer(content, np.uint8))
        sizes, payloads = (t.numpy() for t in self._gather(mine))
        return [part.tobytes() for part in np.split(payloads, np.cumsum(sizes)[:-1])]

    # Traced: an eager collective has no name of its own, by which ranks could match it.

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
        """Sums a gradient over the ranks, divided before and multiplied after."""
        if isinstance(gradient, tf.IndexedSlices):
            return self._sum(gradient)
        if gradient.dtype in (tf.float16, tf.bfloat16):  # `HalfExchange` has divided it
            return self._sum(gradient)
        size = float(self.place.num_replicas)
        return self._sum(gradient, size / self.predivide, self.predivide / size)

    def _all_to_all(self, tensor: Tensor) -> Tensor:
        """Deals out equal parts of a vector, a part to each rank."""
        parts = tf.fill([self.place.num_replicas], tf.size(tensor) // self.place.num_replicas)
        received, _ = self._hvd.alltoall(tensor, parts, process_set=self._process_set)
        return received

    def _adasum(self, gradient: Tensor, share: Tensor) -> Tensor:
        mean = tf.math.divide_no_nan(gradient, tf.cast(share, gradient.dtype))
        wire = tf.cast(mean, self._wire_type or gradient.dtype)
        return tf.cast(adasum(wire, self.place.num_replicas, self.all_gather), gradient.dtype)


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
