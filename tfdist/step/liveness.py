"""Which tensors of a step's graph are in memory at the same time.

Ops are taken to run one after the other, in the order in which they were made. A tensor is in
memory from the op that makes it to the last op that reads its elements.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tfdist._keras import StepGraph

# The output is the input's memory.
ALIASES = frozenset(
    {"Identity", "IdentityN", "Reshape", "Squeeze", "ExpandDims", "StopGradient",
     "PreventGradient", "Snapshot", "XlaOptimizationBarrier"}
)  # fmt: skip
# They read shapes only, which are known.
OF_SHAPES = frozenset(
    {"Shape", "ShapeN", "Size", "Rank", "BroadcastGradientArgs", "ZerosLike", "OnesLike"}
)
# TensorFlow's kernels write the output into an input that nobody reads later.
_IN_PLACE = frozenset(
    {"Add", "AddV2", "AddN", "BiasAdd", "Sub", "Mul", "RealDiv", "Neg", "Exp", "Square", "Sqrt",
     "Rsqrt", "Tanh", "TanhGrad", "Sigmoid", "SigmoidGrad", "Relu", "ReluGrad", "Elu",
     "EluGrad", "Erf", "Softmax", "Maximum", "Minimum", "Pow", "Softplus", "SelectV2"}
)  # fmt: skip
OUTSIDE = frozenset({"Placeholder", "ReadVariableOp", "VarHandleOp"})
_CALLS = frozenset({"While", "StatelessWhile"})


@dataclass(frozen=True)
class Liveness:
    """Bytes of a step's tensors.

    Attributes:
        activations: Bytes of the activations that the backward pass needs, at the end of the
            forward pass. Without weights and the batch.
        peak: The largest number of bytes at a time, with gradients, without weights.
        gradients: Bytes of the gradients.
        gathered: The largest number of bytes of gathered weights at a time.
        largest: Bytes of the largest tensor that is neither a weight nor a gradient.
        largest_name: The name of the op that makes it.
        loops: Names of loops, whose tensors inside are not counted.
        unsized: Number of tensors whose shapes are unknown, which are not counted.
    """

    activations: int
    peak: int
    gradients: int
    gathered: int
    largest: int
    largest_name: str
    loops: tuple[str, ...]
    unsized: int


@dataclass(frozen=True)
class BytesInParts:
    """Weights in parts, which a step gathers where it reads them.

    Attributes:
        weights: Bytes of each whole weight that is gathered, by its id.
        gradients: Bytes of the own part of a gradient, by the id of its weight. A gradient is
            whole from the op that makes it to the last one that reads it.
        again: Whether a whole weight is freed after the forward pass and gathered again.
    """

    weights: Mapping[int, int] = field(default_factory=dict)
    gradients: Mapping[int, int] = field(default_factory=dict)
    again: bool = False


def liveness(step: StepGraph, in_parts: BytesInParts | None = None) -> Liveness:
    """Follows a step op by op.

    Args:
        step: The graph of the step.
        in_parts: What is in parts on the replicas.
    """
    ops = needed_ops(step)
    memory = _Memory(step, ops, in_parts or BytesInParts())
    live = peak = gathered = most_gathered = 0
    largest, largest_name = 0, ""
    activations = sum(
        size
        for root, size in memory.sizes.items()
        if memory.first[root] < step.forward <= memory.last.get(root, -1)
        and root not in memory.gathered
    )
    # Allocated before freed: while an op runs, its inputs and outputs are both in memory.
    for index, op in ops:
        allocated = memory.made_by(index, op)
        live += sum(memory.sizes[root] for root in allocated)
        peak = max(peak, live)
        gathered += sum(memory.sizes[root] for root in memory.gathered & set(allocated))
        most_gathered = max(most_gathered, gathered)
        for root in allocated:
            is_tensor = root not in memory.of_gradients | memory.gathered
            if memory.sizes[root] > largest and is_tensor:
                largest, largest_name = memory.sizes[root], op.name
        ended = memory.ended_by(index, allocated)
        live -= sum(memory.sizes[root] for root in ended)
        gathered -= sum(memory.sizes[root] for root in memory.gathered & set(ended))
    loops = tuple(op.name for _, op in ops if op.type in _CALLS)
    return Liveness(
        activations,
        peak,
        memory.gradients,
        most_gathered,
        largest,
        largest_name,
        loops,
        memory.unsized,
    )


class _Memory:
    """The buffers of a graph: their sizes, and the ops that first and last use them."""

    def __init__(
        self, step: StepGraph, ops: Sequence[tuple[int, Any]], in_parts: BytesInParts
    ) -> None:
        self.sizes: dict[str, int] = {}
        self.unsized = 0
        self.first: dict[str, int] = {}
        self.last: dict[str, int] = {}
        self._aliases: dict[str, str] = {}
        self._ends: dict[int, list[str]] = {}
        self._late: dict[int, list[str]] = {}
        reads = {name: in_parts.weights.get(id_, 0) for name, id_ in step.reads.items()}
        self._add(ops, reads)
        self.gathered = {name for name, size in reads.items() if size}
        if in_parts.again:
            self._gather_again(step.forward, ops)
        self._add_gradients(step, in_parts)
        self._reuse(ops)
        for root, index in self.last.items():
            self._ends.setdefault(index, []).append(root)

    def _add_gradients(self, step: StepGraph, in_parts: BytesInParts) -> None:
        """Keeps gradients to the end; of those in parts the own parts only."""
        end = len(step.ops)
        self.of_gradients = {self._root(t) for t in _dense(step.gradients)}
        self.gradients = 0
        whole: set[str] = set()
        for gradient, weight in zip(step.gradients, step.weights, strict=True):
            root = self._root(*_dense([gradient]))
            part = in_parts.gradients.get(weight)
            if part is None or hasattr(gradient, "values"):  # rows are gathered
                self.gradients += _bytes(*_dense([gradient]))
                whole.add(root)
                continue
            self.gradients += part
            ready = max(self.first[root], self.last.get(root, -1))
            self.last[root] = ready
            self._add_late(f"{weight}/part", part, ready, end)
            self.of_gradients.add(f"{weight}/part")
        for root in whole:
            self.last[root] = end

    def _gather_again(self, forward: int, ops: Sequence[tuple[int, Any]]) -> None:
        """Frees gathered weights between the passes."""
        uses: dict[str, list[int]] = {}
        for index, op in ops:
            for root in {self._root(t) for t in op.inputs} & self.gathered:
                uses.setdefault(root, []).append(index)
        for root, indices in uses.items():
            before = [index for index in indices if index < forward]
            after = [index for index in indices if index >= forward]
            if before and after:
                self.last[root] = before[-1]
                self._add_late(f"{root}/again", self.sizes[root], after[0], after[-1])
                self.gathered.add(f"{root}/again")

    def _add_late(self, name: str, size: int, first: int, last: int) -> None:
        """Adds a buffer that no op of the graph makes."""
        self.sizes[name], self.first[name], self.last[name] = size, first, last
        self._late.setdefault(first, []).append(name)

    def _add(self, ops: Sequence[tuple[int, Any]], reads: Mapping[str, int]) -> None:
        for index, op in ops:
            for number, output in enumerate(op.outputs):
                if op.type in ALIASES and number < len(op.inputs):
                    self._aliases[output.name] = op.inputs[number].name
                    continue
                size = reads.get(output.name, 0) if op.type in OUTSIDE else _bytes(output)
                self.sizes[output.name] = size
                self.unsized += op.type not in OUTSIDE and _is_unsized(output)
                self.first[output.name] = index
        # The gradient of a loop adds inputs to ops that were made before.
        for index, op in ops:
            if op.type not in OF_SHAPES:
                for tensor in op.inputs:
                    self.last[self._root(tensor)] = index

    def _root(self, tensor: Any) -> str:
        """Returns the name of the tensor whose memory a tensor is."""
        name: str = tensor.name
        while name in self._aliases:
            name = self._aliases[name]
        return name

    def _reuse(self, ops: Sequence[tuple[int, Any]]) -> None:
        """Lets ops write into the memory of inputs that end with them."""
        for index, op in ops:
            if op.type not in _IN_PLACE:
                continue
            output = op.outputs[0].name
            for tensor in op.inputs:
                root = self._root(tensor)
                fits = self.sizes[root] == self.sizes[output] > 0
                if fits and self.last.get(root) == index and root not in self.of_gradients:
                    # The input's memory goes on as that of the output.
                    self.last[root] = -1
                    self.first[output] = self.first[root]
                    break

    def made_by(self, index: int, op: Any) -> list[str]:
        """Lists the buffers that an op allocates."""
        made = [t.name for t in op.outputs if self.first.get(t.name) == index]
        return [*made, *self._late.get(index, [])]

    def ended_by(self, index: int, allocated: Iterable[str]) -> list[str]:
        """Lists the buffers that are free after an op."""
        unused = [name for name in allocated if name not in self.last]
        return [*self._ends.get(index, []), *unused]


def needed_ops(step: StepGraph) -> list[tuple[int, Any]]:
    """Lists the ops that gradients and changes of state depend on, with their positions.

    Args:
        step: The graph of the step.
    """
    waiting = [t.op for t in _dense(step.gradients)]
    waiting += [op for op in step.ops if op.type.startswith("Assign")]
    names: set[str] = set()
    while waiting:
        op = waiting.pop()
        if op.name not in names:
            names.add(op.name)
            waiting += [*(t.op for t in op.inputs), *op.control_inputs]
    return [(index, op) for index, op in enumerate(step.ops) if op.name in names]


def _dense(gradients: Iterable[Any]) -> list[Any]:
    return [getattr(gradient, "values", gradient) for gradient in gradients]


def _bytes(tensor: Any) -> int:
    elements = tensor.shape.num_elements() if tensor.shape.rank is not None else None
    return (elements or 0) * int(tensor.dtype.size)


def _is_unsized(tensor: Any) -> bool:
    is_handle = tensor.dtype.size < 1 or tensor.dtype.name in ("resource", "variant")
    return not is_handle and not tensor.shape.is_fully_defined()
