"""The strategy: asynchronous by default, synchronous when asked."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from tfdist import _keras
from tfdist._keras import served
from tfdist.cluster import CHIEF, PS, Cluster
from tfdist.errors import ArgumentError, ServerLostError, StrategyError
from tfdist.strategies.base import Functions, Place, Strategy, Tensor
from tfdist.strategies.parameter_server.asynchronous import Asynchronous
from tfdist.strategies.parameter_server.held import ServerVariables, plan
from tfdist.strategies.parameter_server.servers import connect, serve
from tfdist.strategies.parameter_server.update_log import Staleness
from tfdist.strategies.tf_distribute import (
    MirroredStrategy,
    MirroredVariables,
    TFDistribute,
    require_unused_tensorflow,
)
from tfdist.watchdog.timeouts import WaitLimit


class ParameterServer(TFDistribute):
    """Variables on parameter servers; workers read them, compute, and send gradients.

    The script runs on the chief alone. Made by `strategy="parameter_server"`; pass an
    instance to choose the options below.

    Args:
        cluster: This process's place; read from the environment if None.
        synchronous: False: each worker takes a global batch of its own, and its update is
            applied to whatever the weights have become meanwhile. True: all workers compute
            a share of the same global batch with the same weights, which gives the weights
            of one process. None: True under `tfdist run --synchronous`, else False.
        max_staleness: At most so many updates may come between a step's reading of the
            weights and its own update; no bound if None. 0 makes one step at a time.
        data: "chief": the chief sends batches, of any kind of input. "workers": arrays are
            sent to every worker once, and then only the numbers of a batch's rows; other
            inputs are sent by the chief. Not for synchronous training.
        min_part_bytes: A variable of at least twice as many bytes, with its optimizer's
            state, is split by rows over servers.

    Attributes:
        staleness: Of the last asynchronous training, a `Staleness`, or None.

    Raises:
        ArgumentError: An argument is none of these, or they contradict each other.
        StrategyError: The cluster has no servers, or one did not come up.

    Example:
        >>> import tfdist  # doctest: +SKIP
        >>> tfdist.fit(model, x, y, strategy=tfdist.ParameterServer(synchronous=True))
    """

    name = "parameter_server"
    priority = 50
    has_servers = True

    def __init__(
        self,
        cluster: Cluster | None = None,
        *,
        synchronous: bool | None = None,
        max_staleness: int | None = None,
        data: str = "chief",
        min_part_bytes: int = 4 * 2**20,
    ) -> None:
        if synchronous is None:  # `tfdist run --synchronous`
            synchronous = os.environ.get("TFDIST_SYNCHRONOUS") == "1"
        _check(synchronous, max_staleness, data, min_part_bytes)
        cluster = Cluster.from_environment() if cluster is None else cluster
        obstacle = self.unavailable(cluster)
        if obstacle is not None:
            raise StrategyError(
                f"Parameter servers must be able to run here. Received: {obstacle}."
            )
        if cluster.job != CHIEF:
            serve(cluster)
        if not connect.cache_info().currsize:
            require_unused_tensorflow(cluster)
        self._servers = connect(cluster)
        workers = len(self._servers.workers)
        place = Place(workers, 0, workers) if synchronous else Place()
        strategy = _mirrored(self._servers.workers) if synchronous else None
        wait_limit = WaitLimit.from_environment("the chief", absent=self.silent)
        super().__init__(strategy, place, wait_limit)
        self.synchronous = synchronous
        self.gathers_rows = data == "workers"
        self.min_part_bytes = min_part_bytes
        self.staleness: Staleness | None = None
        self._max_staleness = max_staleness

    @classmethod
    def unavailable(cls, cluster: Cluster) -> str | None:
        """Says why not: the cluster has no chief, no workers or no servers."""
        missing = [j for j in (CHIEF, "worker", PS) if not cluster.jobs.get(j)]
        if missing:
            return (
                f"the cluster has no {' and no '.join(missing)} (TF_CONFIG): start the script "
                "with `tfdist run -n 2 --ps 1 script.py`"
            )
        return None

    @classmethod
    def chosen_by(cls, cluster: Cluster) -> str | None:
        """Says why `auto` chooses it: the cluster has parameter servers."""
        if not cluster.has_parameter_servers:
            return None
        workers, servers = (len(cluster.jobs.get(job, ())) for job in ("worker", PS))
        return f"{workers} workers and {servers} servers in {cluster.source}"

    def describe(self, batch_size: int | None) -> str:
        """Says how a batch is computed."""
        if self.synchronous:
            return f"synchronous, {super().describe(batch_size)}"
        each = "a batch" if batch_size is None else f"batch {batch_size}"
        return f"asynchronous, {each} to a worker"

    @property
    def num_servers(self) -> int:
        """How many parameter servers there are."""
        return len(self._servers.servers)

    def silent(self) -> list[str]:
        """Names the workers and servers that do not answer now."""
        return self._servers.silent()

    def copies(self, variable: Any) -> list[Any]:
        """Gives the one value of a variable, which the servers hold."""
        return Strategy.copies(self, variable)

    def placed(self, variables: Sequence[Any], optimizers: Sequence[Any]) -> Any:
        """Plans where variables go; see `plan`."""
        return plan(variables, optimizers, self.num_servers, self.min_part_bytes)

    def hold(
        self, variables: Sequence[Any], optimizers: Sequence[Any]
    ) -> contextlib.AbstractContextManager[None]:
        """Moves weights and the optimizers' state to the servers, as `Strategy.hold` says.

        In synchronous training each worker has a copy of what it writes in a step.
        """
        on_servers, copied = list(variables), []
        if self.synchronous:
            served_ids = {id(v) for o in optimizers for v in o.variables}
            served_ids |= {id(v) for o in optimizers for v in _keras.trained_variables(o)}
            on_servers = [v for v in variables if id(v) in served_ids]
            copied = [v for v in variables if id(v) not in served_ids]
        return _Both(
            MirroredVariables(self.strategy, copied, ()) if copied else None,
            ServerVariables(
                self.placed(on_servers, optimizers),
                optimizers,
                self._servers.servers,
                functools.partial(served.served, rows_only=not self.synchronous),
            ),
        )

    def own_functions(self, model: Any) -> Functions | None:
        """Makes the asynchronous steps."""
        if self.synchronous:
            return None
        return Asynchronous(
            model, self._servers, self._max_staleness, self.waiting_for, self._note_staleness
        ).functions()

    def summary(self) -> str | None:
        """Says how stale weights were."""
        seen = self.staleness
        if seen is None or not seen.updates:
            return None
        return (
            f"{seen.updates} updates, with gradients of weights that were {seen.mean:.1f} "
            f"updates old on average, {seen.maximum} at most"
        )

    def _note_staleness(self, staleness: Staleness) -> None:
        if staleness.updates:  # an evaluation makes none
            self.staleness = staleness

    # --- synchronous steps ------------------------------------------------------------

    def distribute(self, dataset: Callable[[], Any]) -> Iterable[Any]:
        """Leaves the data on the chief, which feeds the workers."""
        made: Iterable[Any] = dataset()
        return made

    def next_share(self, iterator: Any) -> Any:
        """Draws each worker's share."""
        if not self.synchronous:
            return iterator.get_next()
        shares = [iterator.get_next() for _ in range(self.place.num_replicas)]
        return tf.nest.map_structure(
            lambda *leaves: self.strategy.experimental_distribute_values_from_function(
                lambda context: leaves[context.replica_id_in_sync_group]
            ),
            *shares,
        )

    def reduce_step(
        self,
        gradients: Sequence[Tensor],
        others: Sequence[Tensor],
        share: Tensor,
        variables: Sequence[Any],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Sums gradients on the servers that hold their variables, the rest on the first."""
        first = self._servers.servers[0]
        devices = [_keras.backing_variable(v).device for v in variables] + [first] * len(others)
        summed = self._summed([*gradients, *others], devices)
        return summed[: len(gradients)], summed[len(gradients) :]

    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sums tensors of all workers on the first server; gradients are summed likewise."""
        first = self._servers.servers[0]

        @tf.custom_gradient  # type: ignore[untyped-decorator]
        def summed(*given: Tensor) -> tuple[list[Tensor], Callable[..., list[Tensor]]]:
            devices = [first] * len(given)
            return self._summed(given, devices), lambda *dys: self._summed(dys, devices)

        # A custom gradient takes dense tensors alone, and no layer gathers slices.
        rows = [isinstance(tensor, tf.IndexedSlices) for tensor in tensors]
        slices = [tensor for tensor, is_rows in zip(tensors, rows, strict=True) if is_rows]
        dense = [tensor for tensor, is_rows in zip(tensors, rows, strict=True) if not is_rows]
        gathered = iter(self._summed(slices, [first] * len(slices)))
        added = iter(summed(*dense) if dense else ())
        return [next(gathered if is_rows else added) for is_rows in rows]

    def _summed(self, tensors: Sequence[Tensor], devices: Sequence[str]) -> list[Tensor]:
        if not tensors:
            return []

        def add(strategy: Any, given: Any) -> list[Tensor]:
            sums = []
            for tensor, device in zip(given, devices, strict=True):
                parts = strategy.experimental_local_results(tensor)
                with tf.device(device):
                    sums.append(_sum(parts))
            return sums

        context = tf.distribute.get_replica_context()
        result: list[Tensor] = context.merge_call(add, args=(list(tensors),))
        return result

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Concatenates a tensor of every worker along axis 0."""

        def join(strategy: Any, given: Any) -> Tensor:
            with tf.device(self._servers.servers[0]):
                return tf.concat(strategy.experimental_local_results(given), 0)

        return tf.distribute.get_replica_context().merge_call(join, args=(tensor,))

    def update(self, action: Callable[[], None]) -> None:
        """Updates the variables on the servers, once for all workers."""

        def once(strategy: Any) -> None:
            with tf.device(self._servers.servers[0]):
                action()

        tf.distribute.get_replica_context().merge_call(once)

    @contextlib.contextmanager
    def explaining_losses(self) -> Iterator[None]:
        """Says which process was lost, and what to do."""
        try:
            yield
        except tf.errors.UnavailableError:
            listed = " and ".join(self.silent()) or "one of them"
            raise ServerLostError(
                "All servers, and in synchronous training all workers, must live until "
                f"training ends. Received: no answer from {listed}. "
                "`tfdist run` starts all processes again; with `checkpoint` of `fit` "
                "training goes on from the last one."
            ) from None


class _Both(contextlib.AbstractContextManager[None]):
    """Variables on servers, and copies of others on the workers."""

    def __init__(self, copied: MirroredVariables | None, on_servers: ServerVariables) -> None:
        self._parts = [part for part in (copied, on_servers) if part is not None]

    def __enter__(self) -> None:
        for part in self._parts:
            part.__enter__()

    def __exit__(self, *error: object) -> None:
        for part in reversed(self._parts):
            part.__exit__(*error)


def _check(
    synchronous: bool, max_staleness: int | None, data: str, min_part_bytes: int
) -> None:
    if max_staleness is not None and (not isinstance(max_staleness, int) or max_staleness < 0):
        raise ArgumentError(
            "`max_staleness` must be a whole number, 0 or more, or None. Received: "
            f"max_staleness={max_staleness!r}."
        )
    if synchronous and max_staleness is not None:
        raise ArgumentError(
            "`max_staleness` must not be passed in synchronous training, where no weights are "
            f"stale. Received: synchronous=True, max_staleness={max_staleness!r}."
        )
    if data not in ("chief", "workers") or (synchronous and data != "chief"):
        raise ArgumentError(
            "`data` must be 'chief' or 'workers', and 'chief' in synchronous training. "
            f"Received: data={data!r}, synchronous={synchronous!r}."
        )
    if not isinstance(min_part_bytes, int) or min_part_bytes < 1:
        raise ArgumentError(
            "`min_part_bytes` must be a whole number of at least 1. Received: "
            f"min_part_bytes={min_part_bytes!r}."
        )


def _mirrored(devices: Sequence[str]) -> Any:
    # TensorFlow refuses devices of several processes outside of a graph; in one it does
    # all that is needed here: to trace a function once for each device, in step.
    with tf.Graph().as_default():
        return MirroredStrategy(
            list(devices), cross_device_ops=tf.distribute.ReductionToOneDevice()
        )


def _sum(parts: Sequence[Tensor]) -> Tensor:
    if isinstance(parts[0], tf.IndexedSlices):
        return tf.IndexedSlices(
            tf.concat([part.values for part in parts], 0),
            tf.concat([part.indices for part in parts], 0),
            parts[0].dense_shape,
        )
    return tf.add_n(list(parts))
