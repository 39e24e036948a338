"""What a part of a traced step depends on, writes and draws, as its graph shows.

Python code that runs while a step is traced does not show all of this: a function that
`tf.function` has traced before is not traced again, and not every layer with own code is known.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tensorflow as tf

from tfdist._keras.discovery import RANDOM_OPS
from tfdist._keras.graph_flow import (
    captured,
    functions_of,
    keeps_or_brings,
    sources,
    writes,
    written_from,
)
from tfdist._keras.reads import noting_reads
from tfdist._keras.variables import backing_variable, local_copies

PYTHON_OPS = frozenset({"EagerPyFunc", "PyFunc", "PyFuncStateless"})


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

    def dependence(self, tensors: Any, variables: Iterable[Any], given: Any = None) -> Any:
        """Finds a value from outside on which tensors depend, or what the part writes.

        Args:
            tensors: Results of the part, nested.
            variables: `keras.Variable`s that must not be used. Updates of these variables
                themselves do not count.
            given: Tensors, nested, that may be used, whatever they depend on. Then the
                arguments of traced functions, such as a batch, may be used by these alone,
                however the others came into the part. None does not look at arguments.

        Returns:
            The first of the variables, or the first argument, whose value is used, or None.
        """
        variables = list(variables)
        if self._graph is None:
            return next((v for v in variables if id(v) in self.reads), None)
        owners = {id(handle): v for v in variables for handle in _handles(v)}
        outer = captured(self._graph)
        found = _leaves(tensors)
        for op, index in writes(self._ops):
            if id(outer.get(op.inputs[index].name)) not in owners:
                found += written_from(op, index)
        for source in sources(found, _leaves(given)):
            if id(source) in owners:
                return owners[id(source)]
            if given is not None and hasattr(source, "op"):
                return source
        return None

    def read_besides(self, given: Any, tensors: Any, variables: Iterable[Any]) -> str | None:
        """Names what tensors, or what the part writes, may depend on besides given tensors.

        Args:
            given: As in `dependence`.
            tensors: As in `dependence`.
            variables: As in `dependence`.

        Returns:
            A variable, another tensor of the step, Python code, or an op that may bring data
            in, or None.
        """
        read = self.dependence(tensors, variables, given)
        if read is not None:
            return named(read)
        unseen = self.python() or self.unseen()
        return None if unseen is None else f"TensorFlow's operation {unseen}"

    def written(self, known: Iterable[Any]) -> str | None:
        """Names a resource of TensorFlow that the part writes, if it is not a known one.

        Args:
            known: `keras.Variable`s that may be written.
        """
        ids = {id(handle) for variable in known for handle in _handles(variable)}
        outer = captured(self._graph)
        for op, index in writes(self._ops):
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
        return self._op_of(lambda op: op.type in RANDOM_OPS)

    def python(self) -> str | None:
        """Names an op that calls Python code, if there is one."""
        return self._op_of(lambda op: op.type in PYTHON_OPS)

    def unseen(self) -> str | None:
        """Names an op that may keep data for later steps, or bring some in, but by a resource.

        Random numbers do not count.
        """
        return self._op_of(lambda op: op.type not in RANDOM_OPS and keeps_or_brings(op))

    def _op_of(self, is_sought: Callable[[Any], bool]) -> str | None:
        stack, seen = list(self._ops), set()
        while stack:
            op = stack.pop()
            if is_sought(op):
                return str(op.type)
            for graph in functions_of(op):
                if id(graph) not in seen:
                    seen.add(id(graph))
                    stack += graph.get_operations()
        return None


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


def named(read: Any) -> str:
    """Names a result of `TracedPart.dependence`.

    Args:
        read: A `keras.Variable`, or an argument of a traced function.
    """
    path = getattr(read, "path", None)
    if path is None:
        return f"a tensor that follows from the step's argument {read.op.name!r}"
    return repr(path)


def _handles(variable: Any) -> Iterator[Any]:
    """Lists the handles of a `keras.Variable`'s copies."""
    for copy in local_copies(backing_variable(variable)):
        yield copy.handle


def _leaves(tensors: Any) -> list[Any]:
    return [t for t in tf.nest.flatten(tensors, expand_composites=True) if tf.is_tensor(t)]
