"""What a part of a traced step depends on, writes and draws, as its graph shows.

Python code that runs while a step is traced does not show all of this: a function that
`tf.function` has traced before is not traced again, and not every layer with own code is known.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.python.framework import auto_control_deps_utils as _dependencies

from tfdist._keras.discovery import RANDOM_OPS
from tfdist._keras.reads import noting_reads
from tfdist._keras.replica import Tensor
from tfdist._keras.variables import backing_variable, local_copies

PYTHON_OPS = frozenset({"EagerPyFunc", "PyFunc", "PyFuncStateless"})
_CALLS = frozenset({"PartitionedCall", "StatefulPartitionedCall"})
_IFS = frozenset({"Case", "If", "StatelessCase", "StatelessIf"})
_LOOPS = frozenset({"StatelessWhile", "While"})


class TracedPart:
    """A part of a step: the ops that were made in the context `tracing_part`.

    Without a graph there are no ops. Then the values of `keras.Variable`s that were read are
    known, and nothing else.
    """

    def __init__(self) -> None:
        self.reads: dict[int, Any] = {}
        self._graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
        self._ops: list[Any] = []
        self._begin = 0 if self._graph is None else len(self._graph.get_operations())

    def end(self) -> None:
        """Takes the ops that were made since the beginning."""
        if self._graph is not None:
            self._ops = self._graph.get_operations()[self._begin :]

    def dependence(self, tensors: Any, variables: Iterable[Any]) -> Any:
        """Finds a variable on which tensors depend, or what the part writes elsewhere.

        Args:
            tensors: Results of the part, nested.
            variables: `keras.Variable`s.

        Returns:
            The first of them whose value is used, or None. Updates of these variables
            themselves do not count.
        """
        variables = list(variables)
        if self._graph is None:
            return next((v for v in variables if id(v) in self.reads), None)
        owners = {id(handle): v for v in variables for handle in _handles(v)}
        outer = self._captured()
        tensors_of_graph = [
            t for t in _leaves(tensors) if getattr(t, "graph", None) is self._graph
        ]
        for op, index in _writes(self._ops):
            if id(outer.get(op.inputs[index].name)) not in owners:
                tensors_of_graph += _written_from(op, index)
        inside = {op.name for op in self._ops}
        for name in _reached(tensors_of_graph, inside):
            if id(outer.get(name)) in owners:
                return owners[id(outer[name])]
        return None

    def written(self, known: Iterable[Any]) -> str | None:
        """Names a resource of TensorFlow that the part writes, if it is not a known one.

        Args:
            known: `keras.Variable`s that may be written.
        """
        ids = {id(handle) for variable in known for handle in _handles(variable)}
        outer = self._captured()
        for op, index in _writes(self._ops):
            written = op.inputs[index]
            handle = outer.get(written.name)
            if handle is None and written.op.type in ("StackV2", "TensorArrayV3"):
                continue  # it lives as long as the step
            if id(handle) not in ids:
                variables = getattr(self._graph, "variables", ())
                names = [v.name for v in variables if v.handle is handle]
                return str(names[0] if names else f"resource of {op.type}")
        return None

    def drawing(self) -> str | None:
        """Names an op that draws random numbers without an explicit seed, if there is one."""
        return self._op_of(RANDOM_OPS)

    def python(self) -> str | None:
        """Names an op that calls Python code, if there is one."""
        return self._op_of(PYTHON_OPS)

    def _op_of(self, types: frozenset[str]) -> str | None:
        stack, seen = list(self._ops), set()
        while stack:
            op = stack.pop()
            if op.type in types:
                return str(op.type)
            for graph in _functions(op):
                if id(graph) not in seen:
                    seen.add(id(graph))
                    stack += graph.get_operations()
        return None

    def _captured(self) -> dict[str, Any]:
        """Maps the names of captured tensors in the graph to the tensors outside of it."""
        captures = getattr(self._graph, "captures", ())
        return {inner.name: outer for outer, inner in captures}


@contextlib.contextmanager
def tracing_part() -> Iterator[TracedPart]:
    """Makes a context whose ops are a part of a step.

    Without a graph, functions of `tf.function` run as Python code in it, so that all that they
    read is known.

    Yields:
        The part, which is complete at the end of the context.
    """
    part = TracedPart()
    with contextlib.ExitStack() as stack:
        stack.callback(part.end)
        if tf.executing_eagerly():
            before = tf.config.functions_run_eagerly()
            stack.callback(tf.config.run_functions_eagerly, before)
            tf.config.run_functions_eagerly(True)
        part.reads = stack.enter_context(noting_reads())
        yield part


def _handles(variable: Any) -> Iterator[Any]:
    """Lists the handles of a `keras.Variable`'s copies."""
    for copy in local_copies(backing_variable(variable)):
        yield copy.handle


def _leaves(tensors: Any) -> list[Any]:
    return [t for t in tf.nest.flatten(tensors, expand_composites=True) if tf.is_tensor(t)]


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
            stack += _inputs_of(tensor.op, tensor.value_index)
    return placeholders


def _inputs_of(op: Any, output: int) -> Sequence[Tensor]:
    """Lists the inputs of an op on which one of its outputs depends."""
    graphs = _functions(op)
    if op.type in _CALLS and graphs:
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


def _writes(ops: Iterable[Any]) -> Iterator[tuple[Any, int]]:
    """Lists ops with the number of an input which is a resource that each writes."""
    for op in ops:
        resources = [i for i, t in enumerate(op.inputs) if t.dtype == tf.resource]
        if not resources:
            continue
        # TensorFlow knows of each op which of its resources it only reads.
        read_only = set(_dependencies._get_read_only_resource_input_indices_op(op))
        yield from ((op, index) for index in resources if index not in read_only)


def _written_from(op: Any, index: int) -> list[Tensor]:
    """Lists the inputs of an op on which what it writes to one of them depends."""
    graphs = _functions(op)
    if not graphs or op.type not in _CALLS | _IFS | _LOOPS:
        return [t for t in op.inputs if t.dtype != tf.resource or _calls(op)]
    first = 1 if op.type in _IFS else 0
    numbers: set[int] = set()
    for graph in graphs:
        handle = graph.inputs[index - first].name
        roots = [
            source
            for inner, place in _writes(graph.get_operations())
            if inner.inputs[place].name == handle
            for source in _written_from(inner, place)
        ]
        names = _reached(roots)
        numbers |= {n for n, t in enumerate(graph.inputs) if t.name in names}
    if op.type in _LOOPS:
        # How often the body runs matters too, and what it reads may come from an earlier round.
        numbers |= _of_output(graphs[0], 0)
        return [t for number in numbers for t in _inputs_of(op, number)]
    return [*op.inputs[:first], *(op.inputs[first + n] for n in numbers)]


def _calls(op: Any) -> list[str]:
    """Names the attributes of an op that are functions."""
    attributes = () if op.op_def is None else op.op_def.attr
    return sorted(a.name for a in attributes if a.type in ("func", "list(func)"))


def _functions(op: Any) -> list[Any]:
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
