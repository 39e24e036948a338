"""What flows where in a traced graph: through its ops, and into and out of functions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.python.framework import auto_control_deps_utils as _dependencies

from tfdist._keras.replica import Tensor

CALLS = frozenset({"PartitionedCall", "StatefulPartitionedCall"})
_IFS = frozenset({"Case", "If", "StatelessCase", "StatelessIf"})
_LOOPS = frozenset({"StatelessWhile", "While"})
# Stateful ops that neither keep data for later calls nor bring any in. What they draw, print,
# or check is looked at elsewhere, or ends the program.
_KEEPING_NOTHING = frozenset(
    {
        *CALLS, *_IFS, *_LOOPS, "Assert", "CheckNumerics", "CheckNumericsV2", "DeviceIndex",
        "IsTensorFloat32Enabled", "Print",
        "StatelessRandomGetAlg", "StatelessRandomGetKeyCounter",
        "StatelessRandomGetKeyCounterAlg", "TensorArrayV3", "StackV2", "XlaCallModule",
    }
)  # fmt: skip
# TensorFlow does not know that they only read.
_READING_TABLES = frozenset({"LookupTableExportV2", "LookupTableFindV2", "LookupTableSizeV2"})
# Sums over replicas, and the recurrent layers of GPUs.
_KINDS_KEEPING_NOTHING = ("Collective", "CudnnRNN", "Horovod", "NcclAllReduce")
# TensorFlow does not call them stateful, but they bring several calls together, or write to
# the memory of what they read.
IMPURE_OPS = frozenset(
    {
        "Batch", "BatchFunction", "GetElementAtIndex", "InplaceAdd", "InplaceSub",
        "InplaceUpdate", "Unbatch", "UnbatchGrad",
    }
)  # fmt: skip


def captured(graph: Any) -> dict[str, Tensor]:
    """Maps the names of captured tensors in a graph to the tensors outside of it.

    Args:
        graph: A graph. One that is no function captures nothing.
    """
    return {inner.name: outer for outer, inner in getattr(graph, "captures", ())}


def sources(tensors: Iterable[Tensor], given: Iterable[Tensor] = ()) -> Iterator[Tensor]:
    """Goes back from tensors to what brings values into the graph and the graphs around it.

    Args:
        tensors: Tensors of a graph that is being traced, or of one around it.
        given: Tensors at which the way back ends.

    Yields:
        Tensors without a graph, such as handles of variables, and arguments of functions that
        are being traced, such as a batch.
    """
    seen = {_key(tensor) for tensor in given}
    stack = list(tensors)
    outside: dict[int, dict[str, Tensor]] = {}
    while stack:
        tensor = stack.pop()
        if _key(tensor) in seen:
            continue
        seen.add(_key(tensor))
        if _is_eager(tensor):
            yield tensor
        elif tensor.op.type != "Placeholder":
            stack += inputs_of(tensor.op, tensor.value_index)
        else:
            graph = tensor.graph
            of_graph = outside.setdefault(id(graph), captured(graph))
            if tensor.name in of_graph:
                stack.append(of_graph[tensor.name])
            else:
                yield tensor


def keeps_or_brings(op: Any) -> bool:
    """Returns whether an op may keep data for later calls, or bring some in, unseen.

    What a resource keeps is not unseen: `writes` lists it. Of all other ops that have effects
    only those pass that are known to do neither.

    Args:
        op: An op. The functions that it calls are not looked at.
    """
    if op.type in IMPURE_OPS:
        return True
    if op.op_def is None or not op.op_def.is_stateful or op.type in _KEEPING_NOTHING:
        return False
    if op.type == "PrintV2":
        return bool(op.get_attr("output_stream").startswith(b"file://"))
    if op.type.startswith(_KINDS_KEEPING_NOTHING):
        return False
    return all(t.dtype != tf.resource for t in op.inputs)


def _is_eager(tensor: Tensor) -> bool:
    return isinstance(tensor, tf.__internal__.EagerTensor)


def _key(tensor: Tensor) -> tuple[Any, Any]:
    return (None, id(tensor)) if _is_eager(tensor) else (id(tensor.graph), tensor.name)


def _reached(tensors: Iterable[Tensor], inside: set[str] | None = None) -> set[str]:
    """Names the placeholders of a graph on which tensors depend.

    Args:
        tensors: Tensors of one graph.
        inside: The names of the ops through which to go back. None is all.
    """
    stack, seen, placeholders = list(tensors), set(), set()
    while stack:
        tensor = stack.pop()
        if tensor.name in seen:
            continue
        seen.add(tensor.name)
        if tensor.op.type == "Placeholder":
            placeholders.add(tensor.name)
        elif inside is None or tensor.op.name in inside:
            stack += inputs_of(tensor.op, tensor.value_index)
    return placeholders


def inputs_of(op: Any, output: int) -> Sequence[Tensor]:
    """Lists the inputs of an op on which one of its outputs depends."""
    graphs = functions_of(op)
    if op.type in CALLS and graphs:
        return [op.inputs[i] for i in _of_output(graphs[0], output)]
    if op.type in _IFS and graphs:
        numbers = {i for graph in graphs for i in _of_output(graph, output)}
        return [op.inputs[0], *(op.inputs[1 + i] for i in numbers)]
    if op.type in _LOOPS and len(graphs) == 2:
        condition, body = graphs
        numbers, new = set(), {output, *_of_output(condition, 0)}
        while new:
            numbers |= new
            new = {i for number in new for i in _of_output(body, number)} - numbers
        return [op.inputs[i] for i in numbers]
    return list(op.inputs)


def _of_output(graph: Any, output: int) -> set[int]:
    """Lists the numbers of a function's arguments on which one of its outputs depends."""
    names = _reached([graph.outputs[output]])
    return {number for number, t in enumerate(graph.inputs) if t.name in names}


def writes(ops: Iterable[Any]) -> Iterator[tuple[Any, int]]:
    """Lists ops with the number of an input which is a resource that each writes."""
    for op in ops:
        resources = [i for i, t in enumerate(op.inputs) if t.dtype == tf.resource]
        if not resources or op.type in _READING_TABLES:
            continue
        # TensorFlow knows of each op which of its resources it only reads.
        read_only = set(_dependencies._get_read_only_resource_input_indices_op(op))
        yield from ((op, index) for index in resources if index not in read_only)


def written_from(op: Any, index: int) -> list[Tensor]:
    """Lists the inputs of an op on which what it writes to one of them depends."""
    graphs = functions_of(op)
    if not graphs or op.type not in CALLS | _IFS | _LOOPS:
        return [t for t in op.inputs if t.dtype != tf.resource or _calls(op)]
    first = 1 if op.type in _IFS else 0
    numbers: set[int] = set()
    for graph in graphs:
        handle = graph.inputs[index - first].name
        roots = [
            source
            for inner, place in writes(graph.get_operations())
            if inner.inputs[place].name == handle
            for source in written_from(inner, place)
        ]
        names = _reached(roots)
        numbers |= {n for n, t in enumerate(graph.inputs) if t.name in names}
    if op.type in _LOOPS:
        # How often the body runs matters too, and what it reads may come from an earlier round.
        numbers |= _of_output(graphs[0], 0)
        return [t for number in numbers for t in inputs_of(op, number)]
    return [*op.inputs[:first], *(op.inputs[first + n] for n in numbers)]


def _calls(op: Any) -> list[str]:
    """Names the attributes of an op that are functions."""
    attributes = () if op.op_def is None else op.op_def.attr
    return sorted(a.name for a in attributes if a.type in ("func", "list(func)"))


def functions_of(op: Any) -> list[Any]:
    """Lists the graphs of the functions that an op calls; of a loop, first its condition.

    Returns:
        None of them if one is not known.
    """
    names = _calls(op)
    if op.type in _LOOPS:
        names = ["cond", "body"]
    functions: list[Any] = []
    for name in names:
        value = op.get_attr(name)
        functions += value if isinstance(value, list) else [value]
    graphs = [getattr(op.graph._get_function(f.name), "graph", None) for f in functions]
    return [] if None in graphs else graphs
