"""The strategy `parameter_server`: asynchronous by default, synchronous on request."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import tensorflow as tf

from tfdist import _keras
from tfdist._keras import served
from tfdist.cluster import CHIEF, PS, Cluster
from tfdist.errors import ArgumentError, StrategyError
from tfdist.strategies.base import Functions, Place, Strategy, Tensor
from tfdist.strategies.mirrored_variables import MirroredVariables
from tfdist.strategies.parameter_server.asynchronous import Asynchronous
from tfdist.strategies.parameter_server.server_variables import ServerVariables, plan
from tfdist.strategies.parameter_server.servers import connected
from tfdist.strategies.parameter_server.synchronous import (
    SynchronousVariables,
    concatenate_on_device,
    differentiable_sum,
    mirrored_strategy,
    sum_on_devices,
    update_once,
)
from tfdist.strategies.parameter_server.update_log import Staleness
from tfdist.strategies.tf_distribute import TFDistribute
from tfdist.watchdog.timeouts import WaitLimit


class ParameterServer(TFDistribute):
    """Stores variables on parameter servers. Workers read them and send gradients.

    The script runs on the chief only. `strategy="parameter_server"` makes an instance with
    the default options; pass an instance to choose others.

    Args:
        cluster: The cluster of this process. None reads it from the environment.
        synchronous: False: each worker takes a global batch of its own. Its update is
            applied to the weights as other workers have changed them meanwhile. True: all
            workers compute a part of the same global batch with the same weights, which
            gives the weights of one process. None: True under `tfdist run --synchronous`,
            else False.
        max_staleness: The largest number of updates between a step's reading of the weights
            and its own update. None sets no bound. 0 runs one step at a time.
        data: "chief": the chief sends the batches of any kind of input. "workers": the chief
            sends arrays to every worker once, then only the row numbers of each batch; it
            sends the batches of other inputs. Synchronous training needs "chief".
        min_part_bytes: A variable is split by rows over servers if it has, with its
            optimizer's state, at least twice this number of bytes.

    Attributes:
        staleness: The `Staleness` of the last asynchronous training, or None.

    Raises:
        ArgumentError: An argument is invalid, or two arguments contradict each other.
        StrategyError: The cluster has no servers, or a process did not start in time.

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
        self._servers = connected(cluster)
        workers = len(self._servers.workers)
        place = Place(workers, 0, workers) if synchronous else Place()
        strategy = mirrored_strategy(self._servers.workers) if synchronous else None
        wait_limit = WaitLimit.from_environment("the chief", absent=self.silent)
        super().__init__(strategy, place, wait_limit)
        self.synchronous = synchronous
        self.gathers_rows = data == "workers"
        self.min_part_bytes = min_part_bytes
        self.staleness: Staleness | None = None
        self._max_staleness = max_staleness

    @classmethod
    def unavailable(cls, cluster: Cluster) -> str | None:
        """Returns an obstacle if the cluster has no chief, no workers or no servers."""
        missing = [j for j in (CHIEF, "worker", PS) if not cluster.jobs.get(j)]
        if missing:
            return (
                f"the cluster has no {' and no '.join(missing)} (TF_CONFIG): start the script "
                "with `tfdist run -n 2 --ps 1 script.py`"
            )
        return None

    @classmethod
    def chosen_by(cls, cluster: Cluster) -> str | None:
        """Returns the reason for `auto`: the cluster has parameter servers."""
        if not cluster.has_parameter_servers:
            return None
        workers, servers = (len(cluster.jobs.get(job, ())) for job in ("worker", PS))
        return f"{workers} workers and {servers} servers in {cluster.source}"

    def describe(self, batch_size: int | None) -> str:
        """Returns how a batch is computed."""
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

    def local_tensors(self, variable: Any) -> list[Any]:
        """Returns the one value of a variable, which is on the servers."""
        return Strategy.local_tensors(self, variable)

    def placed(self, variables: Sequence[Any], optimizers: Sequence[Any]) -> Any:
        """Plans the servers of variables; see `plan`."""
        return plan(variables, optimizers, self.num_servers, self.min_part_bytes)

    def hold(
        self, variables: Sequence[Any], optimizers: Sequence[Any]
    ) -> contextlib.AbstractContextManager[None]:
        """Moves weights and the optimizers' state to the servers, as `Strategy.hold` says.

        In synchronous training each worker has a copy of all other variables, such as the
        state of metrics.
        """
        on_servers, on_workers = list(variables), []
        if self.synchronous:
            # Metrics are small, and each step changes all of them: a copy on each worker is
            # faster.
            server_ids = {id(v) for o in optimizers for v in o.variables}
            server_ids |= {id(v) for o in optimizers for v in _keras.trained_variables(o)}
            on_servers = [v for v in variables if id(v) in server_ids]
            on_workers = [v for v in variables if id(v) not in server_ids]
        return SynchronousVariables(
            MirroredVariables(self.strategy, on_workers, ()) if on_workers else None,
            ServerVariables(
                self.placed(on_servers, optimizers),
                optimizers,
                self._servers.servers,
                functools.partial(served.served, rows_only=not self.synchronous),
            ),
        )

    def own_functions(self, model: Any) -> Functions | None:
        """Makes the functions of asynchronous training."""
        if self.synchronous:
            return None
        return Asynchronous(
            model, self._servers, self._max_staleness, self.waiting_for, self._note_staleness
        ).functions()

    def summary(self) -> str | None:
        """Returns how stale the weights were."""
        staleness = self.staleness
        if staleness is None or not staleness.updates:
            return None
        return (
            f"{staleness.updates} updates, with gradients of weights that were "
            f"{staleness.mean:.1f} updates old on average, {staleness.maximum} at most"
        )

    def _note_staleness(self, staleness: Staleness) -> None:
        if staleness.updates:  # an evaluation has none
            self.staleness = staleness

    # --- synchronous steps ------------------------------------------------------------

    def distribute(self, dataset: Callable[[], Any]) -> Iterable[Any]:
        """Leaves the data on the chief, which sends batches to the workers."""
        batches: Iterable[Any] = dataset()
        return batches

    def next_share(self, iterator: Any) -> Any:
        """Returns each worker's per-replica batch."""
        if not self.synchronous:
            return iterator.get_next()
        # The data are on the chief, which draws for each worker in turn.
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
        exact_tensors: Sequence[Tensor],
        share: Tensor,
        variables: Sequence[Any],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Sums gradients on the servers of their variables, the rest on the first server."""
        server = self._servers.servers[0]
        devices = [_keras.backing_variable(variable).device for variable in variables]
        devices += [server] * len(exact_tensors)
        sums = sum_on_devices([*gradients, *exact_tensors], devices)
        return sums[: len(gradients)], sums[len(gradients) :]

    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sums tensors of all workers on the first server. It is differentiable."""
        return differentiable_sum(tensors, self._servers.servers[0])

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Concatenates a tensor of every worker along axis 0."""
        return concatenate_on_device(tensor, self._servers.servers[0])

    # Workers have no collectives of TensorFlow's: servers sum and gather.
    sum_in_groups = Strategy.sum_in_groups
    gather_in_groups = Strategy.gather_in_groups

    def update(self, action: Callable[[], None]) -> None:
        """Updates the variables on the servers, once for all workers."""
        update_once(action, self._servers.servers[0])

    def explaining_losses(self) -> contextlib.AbstractContextManager[None]:
        """Makes a context that says which process was lost, and what you can do."""
        return self._servers.explaining_losses(
            "All servers, and in synchronous training all workers,"
        )


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
