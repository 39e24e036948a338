"""Which tensors of a step's graph are in memory at the same time.

Ops are taken to run one after the other, in the order in which they were made. A tensor is in
memory from the op that makes it to the last op that reads its elements.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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
        largest: Bytes of the largest tensor that is no gradient.
        largest_name: The name of the op that makes it.
        loops: Names of loops, whose tensors inside are not counted.
        unsized: Number of tensors whose shapes are unknown, which are not counted.
    """

    activations: int
    peak: int
    gradients: int
    largest: int
    largest_name: str
    loops: tuple[str, ...]
    unsized: int


def liveness(step: StepGraph) -> Liveness:
    """Follows a step op by op.

    Args:
        step: The graph of the step.
    """
    ops = needed_ops(step)
    memory = _Memory(step, ops)
    live = peak = 0
    largest, largest_name = 0, ""
    activations = sum(
        size
        for root, size in memory.sizes.items()
        if memory.first[root] < step.forward <= memory.last.get(root, -1)
    )
    # Allocated before freed: while an op runs, its inputs and outputs are both in memory.
    for index, op in ops:
        allocated = memory.made_by(index, op)
        live += sum(memory.sizes[root] for root in allocated)
        peak = max(peak, live)
        for root in allocated:
            if memory.sizes[root] > largest and root not in memory.of_gradients:
                largest, largest_name = memory.sizes[root], op.name
        live -= sum(memory.sizes[root] for root in memory.ended_by(index, allocated))
    gradients = sum(map(_bytes, _dense(step.gradients)))
    loops = tuple(op.name for _, op in ops if op.type in _CALLS)
    return Liveness(activations, peak, gradients, largest, largest_name, loops, memory.unsized)


class _Memory:
    """The buffers of a graph: their sizes, and the ops that first and last use them."""

    def __init__(self, step: StepGraph, ops: Sequence[tuple[int, Any]]) -> None:
        self.sizes: dict[str, int] = {}
        self.unsized = 0
        self.first: dict[str, int] = {}
        self.last: dict[str, int] = {}
        self._aliases: dict[str, str] = {}
        self._ends: dict[int, list[str]] = {}
        self._add(ops)
        end = len(step.ops)
        self.of_gradients = {self._root(t) for t in _dense(step.gradients)}
        for root in self.of_gradients:
            self.last[root] = end
        self._reuse(ops)
        for root, index in self.last.items():
            self._ends.setdefault(index, []).append(root)

    def _add(self, ops: Sequence[tuple[int, Any]]) -> None:
        for index, op in ops:
            for number, output in enumerate(op.outputs):
                if op.type in ALIASES and number < len(op.inputs):
                    self._aliases[output.name] = op.inputs[number].name
                    continue
                self.sizes[output.name] = 0 if op.type in OUTSIDE else _bytes(output)
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
        return [t.name for t in op.outputs if self.first.get(t.name) == index]

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
