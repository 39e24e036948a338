"""Checks whether a function of a `tf.data.Dataset` lets an example influence others."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.python.framework import op_def_registry as _op_defs
from tensorflow.python.ops.handle_data_util import get_resource_handle_data as _handle_data

from tfdist._keras.discovery import RANDOM_OPS
from tfdist._keras.graph_flow import IMPURE_OPS
from tfdist._keras.inlined import CALLS, Inlined, InlinedGraphs

PYTHON = frozenset({"EagerPyFunc", "PyFunc", "PyFuncStateless"})
_GENERATORS = frozenset(
    {
        "RngReadAndSkip", "RngSkip", "StatefulStandardNormalV2", "StatefulUniform",
        "StatefulUniformFullInt", "StatefulUniformInt",
    }
)  # fmt: skip
_BOXES = frozenset({"SampleDistortedBoundingBox", "SampleDistortedBoundingBoxV2"})
_DRAWS = RANDOM_OPS | _GENERATORS | _BOXES
_READS = frozenset(
    {
        "Assert", "Case", "DummySeedGenerator", "HashTableV2", "If", "LookupTableFindV2",
        "LookupTableSizeV2", "Placeholder", "PrintV2", "ReadVariableOp", "ResourceGather",
        "ResourceGatherNd", "StatefulPartitionedCall", "VarHandleOp", "While",
    }
)  # fmt: skip
_ASSIGNS = frozenset({"AssignAddVariableOp", "AssignVariableOp"})
_BRANCHES = frozenset(
    {"Case", "If", "MapDefun", "StatelessCase", "StatelessIf", "StatelessWhile", "While"}
)
_TABLES = frozenset(
    {"GatherNd", "GatherV2", "ResourceGather", "ResourceGatherNd", "Slice", "StridedSlice"}
)
_FEW_ROWS, _PART, _MANY_ROWS = 16, 8, 1024


def nodes(function: Any) -> Iterator[Any]:
    """Lists the ops of a traced function, and of the functions that it calls.

    Args:
        function: The function of a dataset.
    """
    definition = function.graph.as_graph_def()
    yield from definition.node
    for inner in definition.library.function:
        yield from inner.node_def


def reads(function: Any) -> bool:
    """Returns whether a function reads files or calls Python, from which examples may come.

    Args:
        function: The function of a dataset.
    """
    return any(node.op in PYTHON | {"ReadFile"} for node in nodes(function))


def captures_datasets(function: Any) -> bool:
    """Returns whether a traced function captures another dataset.

    Args:
        function: The function of a dataset.
    """
    return any(outer.dtype == tf.variant for outer, _ in function.graph.captures)


def state_of(function: Any, shapes: Sequence[Any], graphs: InlinedGraphs) -> str | None:
    """Names an op by which an element may influence later elements, if there is one.

    Python code is not examined. Ops that advance Keras's seeds are allowed if neither their
    number nor the assigned values depend on an element. Otherwise later elements would get
    other random numbers.

    Args:
        function: The function of a dataset.
        shapes: The proven shape of each of its arguments.
        graphs: The inlined graphs of the pipeline.
    """
    definition = function.graph.as_graph_def()
    functions = {f.signature.name: list(f.node_def) for f in definition.library.function}
    seeds = all("seed_generator_state" in v.name for v in function.graph.variables)
    allowed = _READS | _DRAWS | PYTHON | (_ASSIGNS if seeds else frozenset())

    def look(nodes: Any, in_branch: bool, callers: tuple[str, ...]) -> str | None:
        for node in nodes:
            if not _is_pure(node.op) and node.op not in allowed:
                return str(node.op)
            if in_branch and node.op in _DRAWS | _ASSIGNS:
                return f"{node.op} in a branch"
            called = [a.func.name for a in node.attr.values() if a.HasField("func")]
            called += [f.name for a in node.attr.values() for f in a.list.func]
            if called and node.op not in CALLS | _BRANCHES | PYTHON:
                return str(node.op)
            for name in [node.op, *called]:
                if name in functions and name not in callers:
                    branches = in_branch or node.op in _BRANCHES
                    stateful_op = look(functions[name], branches, (*callers, name))
                    if stateful_op is not None:
                        return stateful_op
        return None

    stateful_op = look(definition.node, False, ())
    advances = bool({node.op for node in nodes(function)} & (_DRAWS | _ASSIGNS))
    if stateful_op is not None or not advances:
        return stateful_op
    return _varying_draw(function, shapes, graphs)


def _is_pure(kind: str) -> bool:
    """Returns whether the outputs of an op depend on its inputs alone."""
    op_def = _op_defs.get(kind)
    # An op of a custom library is unknown, and may do anything.
    if op_def is None or kind in IMPURE_OPS:
        return False
    return not op_def.is_stateful and not any(arg.is_ref for arg in op_def.input_arg)


def _varying_draw(function: Any, shapes: Sequence[Any], graphs: InlinedGraphs) -> str | None:
    """Names an op that advances random numbers by a count that depends on an element."""
    try:
        graph = graphs.of(function, shapes)
    except ValueError:
        return "set_shape"
    decided = _decided(graph)
    # A draw advances its generator by the number of its numbers. If an element decides this
    # number, later elements get other random numbers.
    for op in graph.ops:
        varies = any(t.name in decided for t in op.inputs)
        if varies and op.type in _GENERATORS | _ASSIGNS:
            return f"{op.type} of an element"
        if op.type in RANDOM_OPS and not op.outputs[0].shape.is_fully_defined():
            return f"{op.type} of unknown shape"
    return None


def _decided(graph: Inlined, by: Collection[str] = ()) -> Collection[str]:
    """Names the tensors that depend on the elements, without sizes that are always the same.

    Args:
        graph: The graph of a function.
        by: Types of ops whose outputs count as depending on an element, too.
    """
    decided = {t.name for t in graph.elements}
    for op in graph.ops:
        if op.type in by or any(t.name in decided for t in op.inputs):
            sized = op.type == "Shape" and op.inputs[0].shape.is_fully_defined()
            decided.update(t.name for t in op.outputs if not sized)
    return decided


def looks_up_rows(
    function: Any, shapes: Sequence[Any], count: int, graphs: InlinedGraphs
) -> bool:
    """Returns whether an element or a random number chooses from a table of examples.

    A small table, such as one of classes, has no examples. A file that is read for each element
    counts as a table of examples.

    Args:
        function: The function of a dataset.
        shapes: The proven shape of each of its arguments.
        count: The number of elements, negative if unknown.
        graphs: The inlined graphs of the pipeline.
    """
    try:
        graph = graphs.of(function, shapes)
    except ValueError:
        return True
    # A variable that the function advances is a counter, by which it may choose rows.
    counts = {"ReadVariableOp"} if any(op.type in _ASSIGNS for op in graph.ops) else set()
    decided = _decided(graph, _DRAWS | PYTHON | counts)
    # A table counts from one row for every eighth example on: it may hold the examples.
    least = max(_FEW_ROWS, count // _PART) if count >= 0 else _MANY_ROWS
    for op in graph.ops:
        if op.type == "ReadFile" and op.inputs[0].name not in decided:
            return True
        values = op.type == "LookupTableFindV2" and op.outputs[0].dtype.is_floating
        if values and _hash_table_size(graph.resources.get(op.inputs[0].name)) >= least:
            return True
        if op.type in _TABLES and op.inputs[0].name not in decided:
            rows = _table_rows(op.inputs[0])
            if rows >= least and any(t.name in decided for t in op.inputs):
                return True
    return False


def most_rows(function: Any) -> int:
    """Returns the longest axis of all constants and captured tables of a function.

    Args:
        function: The function of a dataset.
    """
    captured = [inner for _, inner in function.graph.captures]
    constants = [
        tf.TensorShape(node.attr["value"].tensor.tensor_shape)
        for node in nodes(function)
        if node.op == "Const"
    ]
    shapes = [*constants, *map(_table_shape, captured)]
    return max((size or 0 for shape in shapes if shape.rank for size in shape), default=0)


def _table_rows(table: Any) -> int:
    shape = _table_shape(table)
    return int(shape[0] or 0) if shape.rank else 0


def _table_shape(table: Any) -> Any:
    if table.dtype != tf.resource:
        return table.shape
    # Of a variable, the handle knows the shape.
    data = _handle_data(table)
    return tf.TensorShape(data.shape_and_type[0].shape if data.is_set else None)


def _hash_table_size(handle: Any) -> int:
    if not isinstance(handle, tf.__internal__.EagerTensor):
        return 0
    with tf.init_scope():
        return int(tf.raw_ops.LookupTableSizeV2(table_handle=handle))


def varying_op(function: Any) -> str | None:
    """Names an op that may return something else in each call, if there is one.

    Args:
        function: The function of a dataset.
    """
    varying_ops = {node.op for node in nodes(function)} & (_DRAWS | PYTHON | _ASSIGNS)
    return min(varying_ops, default=None)
