"""`tfdist.Pipeline`: layers on the devices of one process, or on server processes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from tfdist.cluster import Cluster
from tfdist.errors import ArgumentError, StrategyError
from tfdist.sharding.pipeline.placed import PlacedVariables
from tfdist.sharding.pipeline.plan import PipelinePlan, plan
from tfdist.strategies.base import Place, Strategy
from tfdist.strategies.parameter_server.servers import connected
from tfdist.watchdog.timeouts import WaitLimit


class Pipeline(Strategy):
    """Trains a model whose layers are on several devices.

    In a single process these are its own devices. Under `tfdist run -n 2 --ps 1` they are those
    of the workers and then of the servers, which may be on other machines. The script runs on
    the chief, which sends batches to the first stage and computes no layer.

    The model is cut into stages of consecutive layers, one on each device. A batch is cut into
    micro-batches, which go from stage to stage, so that all devices work at the same time
    (Huang et al., "GPipe: Efficient Training of Giant Neural Networks using Pipeline
    Parallelism", NeurIPS 2019). The weights are those of one process, up to the order of float
    additions.

    Args:
        stages: Number of devices. They are the first GPUs, or the first logical CPUs. Of a
            worker it is the first GPU or the CPU, of a server the CPU.
        microbatches: Into how many parts a batch is cut. With p stages and m parts, a device
            waits (p - 1) / (m + p - 1) of the time.
        recompute: Whether the backward pass computes activations again. If not, those of all
            micro-batches are kept.

    Raises:
        ArgumentError: A number is not positive, or there is a single stage.
        StrategyError: A process of the cluster did not start in time.

    Example:
        >>> import tfdist
        >>> tfdist.Pipeline(stages=2, microbatches=8).describe(64)
        '2 stages, batch 64 in 8 micro-batches'
    """

    name = "pipeline"
    has_stages = True
    compiles = False

    def __init__(self, stages: int = 2, microbatches: int = 8, recompute: bool = True) -> None:
        for name, number, least in (("stages", stages, 2), ("microbatches", microbatches, 1)):
            if not isinstance(number, int) or isinstance(number, bool) or number < least:
                raise ArgumentError(
                    f"`{name}` must be a whole number of at least {least}. Received: "
                    f"{name}={number!r}."
                )
        self.stages = stages
        self.microbatches = microbatches
        self.recompute = recompute
        self.place = Place()
        self._planned: tuple[Any, PipelinePlan] | None = None
        cluster = Cluster.from_environment()
        self._servers = connected(cluster) if cluster.has_parameter_servers else None
        self._wait_limit = (
            None
            if self._servers is None
            else WaitLimit.from_environment("the chief", absent=self._servers.silent)
        )

    def __repr__(self) -> str:
        return (
            f"Pipeline(stages={self.stages}, microbatches={self.microbatches}, "
            f"recompute={self.recompute})"
        )

    @classmethod
    def unavailable(cls, cluster: Cluster) -> str | None:
        """Returns an obstacle if there are several workers."""
        if cluster.num_workers > 1:
            return f"the cluster has {cluster.num_workers} workers, and a pipeline is in one"
        return None

    def devices(self) -> list[str]:
        """Returns the names of the stages' devices.

        Raises:
            StrategyError: This process has too few devices, or is one of several.
        """
        if self._servers is not None:
            if len(self._servers.devices) < self.stages:
                raise StrategyError(
                    "`Pipeline` needs a worker or server for each stage. Received: "
                    f"{self!r} and {len(self._servers.workers)} workers and "
                    f"{len(self._servers.servers)} servers. Use fewer stages, or start more: "
                    f"`tfdist run -n {self.stages} --ps 1`."
                )
            return list(self._servers.devices[: self.stages])
        reason = self.unavailable(Cluster.from_environment())
        if reason is not None:
            raise StrategyError(
                "`Pipeline` must run in a single process, or on workers and servers. "
                f"Received: {reason}. Start the script without `tfdist run`, or with "
                f"`tfdist run -n {self.stages} --ps 1`, or use another strategy."
            )
        devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
        if len(devices) < self.stages:
            raise StrategyError(
                "`Pipeline` needs a device for each stage. Received: "
                f"{self!r} and {len(devices)} devices. Use fewer stages, or divide the CPU "
                "at the beginning of the script: tf.config.set_logical_device_configuration("
                "tf.config.list_physical_devices('CPU')[0], "
                f"[tf.config.LogicalDeviceConfiguration()] * {self.stages})."
            )
        return [device.name for device in devices[: self.stages]]

    def plan(self, model: Any) -> PipelinePlan:
        """Cuts a model into stages.

        Args:
            model: A built `keras.Model`.

        Raises:
            ArgumentError: The model cannot be cut.
            StrategyError: There are too few devices.
        """
        if self._planned is None or self._planned[0] is not model:
            self._planned = model, plan(model, self.devices(), self.microbatches)
        return self._planned[1]

    def examine(self, model: Any) -> None:
        """Cuts a model, whose variables `hold` places."""
        self.plan(model)

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Runs a step. What belongs to no stage, such as the loss, is on the last device."""
        with tf.device(self.devices()[-1]):
            return function(*args)

    def hold(
        self, variables: Sequence[Any], optimizers: Sequence[Any]
    ) -> contextlib.AbstractContextManager[None]:
        """Places variables on the devices of their stages."""
        assert self._planned is not None
        return PlacedVariables(*self._planned, self.recompute, variables, optimizers)

    def silent(self) -> list[str]:
        """Names the processes of stages that do not answer now."""
        return [] if self._servers is None else self._servers.silent()

    def waiting_for(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Limits a wait for the processes of stages."""
        if self._wait_limit is None:
            return contextlib.nullcontext()
        return self._wait_limit.waiting_for(what)

    def explaining_losses(self) -> contextlib.AbstractContextManager[None]:
        """Makes a context that says which process was lost, and what you can do."""
        if self._servers is None:
            return contextlib.nullcontext()
        return self._servers.explaining_losses("All processes with a stage")

    def describe(self, batch_size: int | None) -> str:
        """Returns how many stages there are, and how a batch is cut."""
        batch = "a batch" if batch_size is None else f"batch {batch_size}"
        return f"{self.stages} stages, {batch} in {self.microbatches} micro-batches"
