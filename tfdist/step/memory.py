"""`tfdist.memory`: an estimate of the memory that training takes on each device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras

from tfdist import _keras
from tfdist.errors import ArgumentError
from tfdist.step.liveness import Liveness, liveness
from tfdist.strategies.session import current


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of a training on one of several equal devices.

    Attributes:
        replicas: Number of devices, each with one replica.
        rows: Number of examples of a device's part of the batch.
        weights: Bytes of the model's variables.
        slots: Bytes of the optimizer's variables.
        gradients: Bytes of the gradients.
        exchange: Bytes of the gradients' sums over all replicas.
        activations: Bytes of the activations that are kept for the backward pass.
        step: The largest number of bytes of activations, gradients and temporary tensors that
            are in memory at the same time. It is less than the sum of its parts if
            activations are free before all gradients are there.
        largest: Bytes of the largest tensor that is neither a weight nor a gradient.
        largest_name: The op that makes it.
    """

    replicas: int
    rows: int
    weights: int
    slots: int
    gradients: int
    exchange: int
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
        strategy: The name of the strategy.
        batch_size: Number of examples of a batch, over all replicas.
        devices: The memory of a device, for 1, 2, 4, ... and all replicas.
        recomputed: Number of layers that compute their activations again.
        loops: Names of loops in the graph. Activations inside are not counted.
        unsized: Number of tensors of unknown shape, which are not counted.
    """

    strategy: str
    batch_size: int
    devices: tuple[DeviceMemory, ...]
    recomputed: int = 0
    loops: tuple[str, ...] = ()
    unsized: int = 0

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
            ("activations kept", [_mib(d.activations) for d in self.devices]),
            ("most at a time in a step", [_mib(d.step) for d in self.devices]),
            ("estimated peak", [_mib(d.total) for d in self.devices]),
        ]
        width = max(len(cell) for _, cells in rows for cell in cells)
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

    Args:
        model: A built `keras.Model`. Its optimizer gets its slots, if it has none yet.
        batch_size: Number of examples of a batch, over all replicas.
        strategy: As in `tfdist.fit`. Not with parameter servers; see `tfdist.placement`.
        replicas: Number of replicas to estimate for. If None, that of the strategy.
        x: Some examples, whose shapes are used. Needed for models that do not know the shapes
            of their inputs.
        y: Some targets. If None, they have the shape that the loss usually takes.

    Returns:
        The estimate. Print it to see a table.

    Raises:
        ArgumentError: The model is not built, its inputs are unknown, a number is not
            positive, or the strategy has servers.

    Example:
        >>> import keras, tfdist
        >>> model = keras.Sequential([keras.Input((100,)), keras.layers.Dense(10)])
        >>> model.compile("adam", "mse")
        >>> tfdist.memory(model, batch_size=50).device.weights
        4040
    """
    _check(model, batch_size, replicas)
    selected = current(strategy).strategy
    if selected.has_servers:
        raise ArgumentError(
            "`memory` needs a strategy whose devices hold all weights. Received: "
            f"strategy={selected.name!r}. tfdist.placement shows what each server holds."
        )
    count = replicas or selected.place.num_replicas
    # Powers of two show how the memory of a device falls with the number of devices.
    counts = sorted({count, *(2**i for i in range(count.bit_length()) if 2**i < count)})
    steps = [_step(model, -(-batch_size // number), x, y) for number in counts]
    weights, slots = sum(map(_keras.num_bytes, model.variables)), _slots(model)
    devices = tuple(
        DeviceMemory(
            replicas=number,
            rows=-(-batch_size // number),
            weights=weights,
            slots=slots,
            gradients=step.gradients,
            exchange=step.gradients if number > 1 else 0,
            activations=step.activations,
            step=step.peak,
            largest=step.largest,
            largest_name=step.largest_name,
        )
        for number, step in zip(counts, steps, strict=True)
    )
    recomputed = len(_keras.recomputed_calls(model))
    loops, unsized = steps[-1].loops, steps[-1].unsized
    return Memory(selected.name, batch_size, devices, recomputed, loops, unsized)


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


def _slots(model: Any) -> int:
    """Counts the bytes of the optimizer's variables."""
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        return 0
    if not optimizer.built:
        optimizer.build(model.trainable_variables)
    return sum(map(_keras.num_bytes, optimizer.variables))


def _step(model: Any, rows: int, x: Any, y: Any) -> Liveness:
    """Follows a step with some rows."""
    specs = _keras.batch_specs(model, rows, x, y)
    if specs is None:
        raise ArgumentError(
            "`x` must be given for a model that does not know the shapes of its inputs. "
            f"Received: model {model.name!r} and x=None. Pass some examples."
        )
    return liveness(_keras.step_graph(model, *specs))


def _mib(number: int) -> str:
    return f"{number / 2**20:,.1f}"
