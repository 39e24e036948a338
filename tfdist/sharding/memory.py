"""`tfdist.memory`: an estimate of the memory that training takes on each device."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import keras

from tfdist import _keras
from tfdist.errors import ArgumentError
from tfdist.sharding.exchange import ShardedExchange
from tfdist.sharding.updates import ShardedUpdates
from tfdist.step.liveness import BytesInParts, Liveness, liveness
from tfdist.step.state import optimizers_of
from tfdist.strategies.base import Place, Strategy
from tfdist.strategies.keras_distribution import without_distribution
from tfdist.strategies.model_parallel import ModelParallel
from tfdist.strategies.session import current
from tfdist.strategies.zero import Zero


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of a training on one of several equal devices.

    Attributes:
        replicas: Number of devices, each with one replica.
        rows: Number of examples of a device's part of the batch.
        weights: Bytes of the model's variables, or of the device's parts of them.
        slots: Bytes of the optimizer's variables, or of the device's parts of them.
        gradients: Bytes of the gradients that are kept for the update.
        exchange: Bytes of the gradients' sums over all replicas, besides the gradients.
        gathered: The largest number of bytes of weights at a time that are in parts and that
            the step has gathered.
        activations: Bytes of the activations that are kept for the backward pass.
        step: The largest number of bytes of activations, gradients, gathered weights and
            temporary tensors that are in memory at the same time. It is less than the sum of
            its parts if activations are free before all gradients are there.
        largest: Bytes of the largest tensor that is neither a weight nor a gradient.
        largest_name: The op that makes it.
    """

    replicas: int
    rows: int
    weights: int
    slots: int
    gradients: int
    exchange: int
    gathered: int
    activations: int
    step: int
    largest: int
    largest_name: str

    @property
    def total(self) -> int:
        """The estimated peak."""
        # Sums are there only after the backward pass, when no activations are left.
        return self.weights + self.slots + max(self.step, self.gradients + self.exchange)


@dataclass(frozen=True)
class Memory:
    """The memory of a training on each device, for several numbers of devices. It prints well.

    Attributes:
        strategy: The name of the strategy, and what is in parts.
        batch_size: Number of examples of a batch, over all replicas.
        devices: The memory of a device, for 1, 2, 4, ... and all replicas.
        recomputed: Number of layers that compute their activations again.
        loops: Names of loops in the graph. Activations inside are not counted.
        unsized: Number of tensors of unknown shape, which are not counted.
        teams: Number of layers that several replicas compute together. The rows that they
            gather for that are not counted.
    """

    strategy: str
    batch_size: int
    devices: tuple[DeviceMemory, ...]
    recomputed: int = 0
    loops: tuple[str, ...] = ()
    unsized: int = 0
    teams: int = 0

    @property
    def device(self) -> DeviceMemory:
        """The memory of a device with all replicas."""
        return self.devices[-1]

    def __str__(self) -> str:
        rows = [
            ("replicas", [str(d.replicas) for d in self.devices]),
            ("examples on each", [str(d.rows) for d in self.devices]),
            ("weights", [_mib(d.weights) for d in self.devices]),
            ("optimizer's slots", [_mib(d.slots) for d in self.devices]),
            ("gradients", [_mib(d.gradients) for d in self.devices]),
            ("sums of gradients", [_mib(d.exchange) for d in self.devices]),
            ("weights gathered", [_mib(d.gathered) for d in self.devices]),
            ("activations kept", [_mib(d.activations) for d in self.devices]),
            ("most at a time in a step", [_mib(d.step) for d in self.devices]),
            ("estimated peak", [_mib(d.total) for d in self.devices]),
        ]
        width = max(len(cell) for _, cells in rows for cell in cells)
        if not any(device.gathered for device in self.devices):
            rows = [row for row in rows if row[0] != "weights gathered"]
        lines = [f"MiB on each device, {self.strategy}, batch of {self.batch_size}"]
        lines += [
            f"{name.ljust(26)}{'  '.join(cell.rjust(width) for cell in cells)}"
            for name, cells in rows
        ]
        last = self.device
        lines.append(f"largest tensor: {_mib(last.largest)} MiB, {last.largest_name}")
        if self.recomputed:
            lines.append(f"layers that compute their activations again: {self.recomputed}")
        if self.loops:
            lines.append(f"not counted: what is inside the loops {', '.join(self.loops)}")
        if self.unsized:
            lines.append(f"not counted: {self.unsized} tensors of unknown shape")
        if self.teams:
            lines.append(f"not counted: the rows that {self.teams} layers in parts gather")
        return "\n".join(lines)


def memory(
    model: Any,
    batch_size: int = 32,
    strategy: Any = "auto",
    *,
    replicas: int | None = None,
    x: Any = None,
    y: Any = None,
) -> Memory:
    """Estimates the memory that a training takes on each device, without training.

    The step's graph is traced from the shapes of the batch, and not run. Each tensor is taken
    to be in memory from the op that makes it to the last op that reads it, in the order of the
    trace. What libraries, TensorFlow's allocator and the input pipeline need comes in addition:
    on a CPU some 400 MiB for a process with TensorFlow.

    With `tfdist.Zero` and `tfdist.ModelParallel`, weights and the optimizer's state are counted
    as the parts that training would make. A whole gradient is counted until it is scattered.

    Args:
        model: A built `keras.Model`. Its optimizer gets its slots, if it has none yet.
        batch_size: Number of examples of a batch, over all replicas.
        strategy: As in `tfdist.fit`. Not with parameter servers; see `tfdist.placement`. The
            devices of a mesh need not be there.
        replicas: Number of replicas to estimate for. If None, that of the strategy, or of the
            mesh.
        x: Some examples, whose shapes are used. Needed for models that do not know the shapes
            of their inputs.
        y: Some targets. If None, they have the shape that the loss usually takes.

    Returns:
        The estimate. Print it to see a table.

    Raises:
        ArgumentError: The model is not built, its inputs are unknown, a number is not
            positive or not that of the mesh, or the strategy has servers or is a pipeline.

    Example:
        >>> import keras, tfdist
        >>> model = keras.Sequential([keras.Input((100,)), keras.layers.Dense(10)])
        >>> model.compile("adam", "mse")
        >>> tfdist.memory(model, batch_size=50).device.weights
        4040
        >>> in_parts = tfdist.memory(model, strategy=tfdist.Zero(stage=3), replicas=2)
        >>> in_parts.device.weights  # half of the kernel, and the bias
        2040
    """
    _check(model, batch_size, replicas)
    selected, settings, counts = _resolved(strategy, replicas)
    _build(model)
    estimates = [_estimate(model, batch_size, selected, settings, n, x, y) for n in counts]
    step, division = estimates[-1][1:]
    return Memory(
        f"{selected.name}{_kind(settings)}",
        batch_size,
        tuple(device for device, _, _ in estimates),
        len(_keras.recomputed_calls(model)),
        step.loops,
        step.unsized,
        division,
    )


def _kind(settings: Zero | ModelParallel | None) -> str:
    if isinstance(settings, Zero):
        return f", Zero(stage={settings.stage})"
    if settings is None:
        return ""
    return f", ModelParallel on {settings.axes}" if settings.axes else ", ModelParallel"


def _resolved(
    strategy: Any, replicas: int | None
) -> tuple[Strategy, Zero | ModelParallel | None, list[int]]:
    """Returns the strategy, what is in parts, and the numbers of replicas to estimate for."""
    strategy = without_distribution(strategy)
    if isinstance(strategy, Zero | ModelParallel):
        settings: Zero | ModelParallel | None = strategy
        selected = current(strategy.on).strategy
    else:
        session = current(strategy)
        selected, settings = session.strategy, session.zero
    if selected.has_servers:
        raise ArgumentError(
            "`memory` needs a strategy whose devices hold all weights. Received: "
            f"strategy={selected.name!r}. tfdist.placement shows what each server holds."
        )
    if selected.has_stages:
        raise ArgumentError(
            "`memory` needs devices that compute the same layers. Received: "
            f"strategy={selected!r}. tfdist.placement shows the bytes of each stage."
        )
    devices = settings.devices if isinstance(settings, ModelParallel) else None
    if devices is not None:
        if replicas not in (None, devices):
            raise ArgumentError(
                "`replicas` must be the number of devices of the mesh. Received: "
                f"replicas={replicas} with {devices} devices. Leave `replicas` out."
            )
        return selected, settings, sorted({1, devices})
    count = replicas or selected.place.num_replicas
    # Powers of two show how the memory of a device falls with the number of devices.
    powers = (2**i for i in range(count.bit_length()) if 2**i < count)
    return selected, settings, sorted({count, *powers})


def _estimate(
    model: Any,
    batch_size: int,
    strategy: Strategy,
    settings: Zero | ModelParallel | None,
    number: int,
    x: Any,
    y: Any,
) -> tuple[DeviceMemory, Liveness, int]:
    """Estimates for a number of replicas; also gives the number of layers in parts."""
    rows = -(-batch_size // number)
    exchange = None
    if settings is not None and number > 1:
        exchange = ShardedUpdates.of(settings).make(model, _with_replicas(strategy, number))
    step = _step(model, rows, x, y, _in_parts(model, exchange, settings))
    summed = step.gradients if number > 1 else 0
    if exchange is not None:
        # In stage 3, and with teams, the sums take the place of the gradients.
        own = sum(_part_of(v, exchange) for v in model.trainable_weights)
        summed = own if settings is not None and settings.stage == 1 else 0
    weights = model.variables
    slots = [variable for o in optimizers_of(model) for variable in o.variables]
    device = DeviceMemory(
        replicas=number,
        rows=rows,
        weights=sum(_bytes(v, exchange) for v in weights),
        slots=sum(_bytes(v, exchange) for v in {id(v): v for v in slots}.values()),
        gradients=step.gradients,
        exchange=summed,
        gathered=step.gathered,
        activations=step.activations,
        step=step.peak,
        largest=step.largest,
        largest_name=step.largest_name,
    )
    return device, step, 0 if exchange is None else len(exchange.division.plan.layers)


def _with_replicas(strategy: Strategy, number: int) -> Strategy:
    """Returns a strategy that is asked for its number of replicas, and for no collective."""
    other = copy.copy(strategy)
    other.place = Place(number)
    return other


def _in_parts(
    model: Any, exchange: ShardedExchange | None, settings: Zero | ModelParallel | None
) -> BytesInParts | None:
    """Returns which weights a step gathers, and which gradients it scatters."""
    if exchange is None or settings is None or settings.stage == 1:
        return None
    cut = [v for v in model.trainable_weights if id(v) in exchange.cuts]
    gathered = [v for v in cut if id(v) not in exchange.division.cuts]
    return BytesInParts(
        {id(v): _keras.num_bytes(v) for v in gathered},
        {id(v): _bytes(v, exchange) for v in cut},
        settings.gather_again,
    )


def _bytes(variable: Any, exchange: ShardedExchange | None) -> int:
    """Counts the bytes that a device has of a variable."""
    whole: int = _keras.num_bytes(variable)
    cut = None if exchange is None else exchange.cuts.get(id(variable))
    return whole if cut is None else whole * cut.part_size // max(cut.size, 1)


def _part_of(weight: Any, exchange: ShardedExchange) -> int:
    """Counts the bytes of the sum of a weight's gradient."""
    whole: int = _keras.num_bytes(weight)
    cut = exchange.cut_of(weight) if exchange.takes_parts(weight) else None
    return whole if cut is None else whole * cut.part_size // max(cut.size, 1)


def _check(model: Any, batch_size: Any, replicas: Any) -> None:
    for name, number in (("batch_size", batch_size), ("replicas", replicas)):
        if number is not None and (not isinstance(number, int) or number < 1):
            raise ArgumentError(
                f"`{name}` must be a positive whole number. Received: {name}={number!r}."
            )
    if not isinstance(model, keras.Model) or not model.built:
        raise ArgumentError(
            "`model` must be a built keras.Model. Received: "
            f"model={model!r}. Give it an Input, or call it once."
        )


def _build(model: Any) -> None:
    """Gives optimizers their variables."""
    for optimizer in optimizers_of(model):
        if not optimizer.built:
            optimizer.build(model.trainable_variables)


def _step(model: Any, rows: int, x: Any, y: Any, in_parts: BytesInParts | None) -> Liveness:
    """Follows a step with some rows."""
    specs = _keras.batch_specs(model, rows, x, y)
    if specs is None:
        raise ArgumentError(
            "`x` must be given for a model that does not know the shapes of its inputs. "
            f"Received: model {model.name!r} and x=None. Pass some examples."
        )
    return liveness(_keras.step_graph(model, *specs), in_parts)


def _mib(number: int) -> str:
    return f"{number / 2**20:,.1f}"
