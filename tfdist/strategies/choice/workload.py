"""What is to be trained, in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tfdist.cluster.cost import Rates, Work


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a step on one device, besides weights and the optimizer's state.

    Attributes:
        activations: Bytes that the forward pass keeps for the backward pass.
        peak: The largest number of bytes at a time, with gradients and temporary tensors.
        inputs: Bytes of the device's part of a batch.
    """

    activations: int
    peak: int
    inputs: int


@dataclass(frozen=True)
class Workload:
    """A model, its data and its batch, in numbers.

    Attributes:
        model: The model's name.
        batch_size: Examples of a global batch.
        parameters: Number of trainable parameters.
        variables: Number of trainable variables.
        weight_bytes: Bytes of the model's variables.
        gradient_bytes: Bytes of the gradients.
        slot_bytes: Bytes of the optimizer's variables.
        work: What the step of a whole batch computes.
        memory: A device's memory, by its number of rows.
        measured_s: Measured seconds of a step, by numbers of rows and of cores.
        rows: Examples of the data, if known.
        data_bytes: Bytes of the data that a process holds; 0 if they are not arrays.
        input_s: Measured seconds in which the input pipeline makes a batch, if known.
        class_ratio: Examples of the largest class over those of the smallest, if known.
        classes: Number of classes, if known.
        indivisible: Why replicas cannot share a batch, if they cannot.
        refused: Why tfdist refuses a strategy for this model, by the strategy's name.
        notes: What was assumed, or not counted.
    """

    model: str
    batch_size: int
    parameters: int
    variables: int
    weight_bytes: int
    gradient_bytes: int
    slot_bytes: int
    work: Work
    memory: Mapping[int, StepMemory]
    measured_s: Mapping[tuple[int, int], float] = field(default_factory=dict)
    rows: int | None = None
    data_bytes: int = 0
    input_s: float | None = None
    class_ratio: float | None = None
    classes: int | None = None
    indivisible: str | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def memory_with(self, rows: int) -> StepMemory:
        """Returns the memory of a step with some rows; between known numbers, by a line.

        Args:
            rows: Rows of one device.
        """
        if rows in self.memory:
            return self.memory[rows]
        known = sorted(self.memory)
        low = max((n for n in known if n < rows), default=known[0])
        high = min((n for n in known if n > rows), default=known[-1])
        if low == high:
            return self.memory[low]
        part = (rows - low) / (high - low)
        one, other = self.memory[low], self.memory[high]

        def between(a: int, b: int) -> int:
            return round(a + part * (b - a))

        return StepMemory(
            between(one.activations, other.activations),
            between(one.peak, other.peak),
            between(one.inputs, other.inputs),
        )

    def compute_s(self, rows: int, cores: int, rates: Rates) -> float:
        """Returns the time in which a device computes a step.

        Measured times count first. For other numbers, a roofline of the same work says how
        much longer or shorter it takes than the nearest measured one.

        Args:
            rows: Rows of the device's part of a batch.
            cores: Cores of the device, if it is a CPU.
            rates: How fast one device with all its cores computes.
        """
        if (rows, cores) in self.measured_s:
            return self.measured_s[rows, cores]
        predicted = self._roofline_s(rows, rates)
        if not self.measured_s:
            return predicted

        def distance(point: tuple[int, int]) -> tuple[bool, float]:
            return point[1] != cores, abs(point[0] - rows)

        nearest = min(self.measured_s, key=distance)
        scale = predicted / self._roofline_s(nearest[0], rates)
        return self.measured_s[nearest] * scale * nearest[1] / cores

    def _roofline_s(self, rows: int, rates: Rates) -> float:
        part = rows / self.batch_size
        work = Work(self.work.flops * part, self.work.moved_bytes * part, self.work.ops)
        return rates.seconds(work)
