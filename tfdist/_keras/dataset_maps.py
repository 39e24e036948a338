"""Checks whether a function of a `tf.data.Dataset` lets an example influence others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import tensorflow as tf
from tensorflow.python.framework import op_def_registry as _op_defs

from tfdist._keras.discovery import RANDOM_OPS

_PYTHON = frozenset({"EagerPyFunc", "PyFunc", "PyFuncStateless"})
_DRAWS = RANDOM_OPS | {
    "RngReadAndSkip", "RngSkip", "SampleDistortedBoundingBox", "SampleDistortedBoundingBoxV2",
    "StatefulStandardNormalV2", "StatefulUniform", "StatefulUniformFullInt",
    "StatefulUniformInt",
}  # fmt: skip
_READS = frozenset(
    {
        "Assert", "Case", "DummySeedGenerator", "HashTableV2", "If", "LookupTableFindV2",
        "LookupTableSizeV2", "Placeholder", "PrintV2", "ReadVariableOp", "ResourceGather",
        "ResourceGatherNd", "StatefulPartitionedCall", "VarHandleOp", "While",
    }
)  # fmt: skip
_ASSIGNS = frozenset({"AssignAddVariableOp", "AssignVariableOp"})
_BRANCHES = frozenset({"Case", "If", "StatelessCase", "StatelessIf", "StatelessWhile", "While"})


def nodes(function: Any) -> Iterator[Any]:
    """Lists the ops of a traced function, and of the functions that it calls.

    Args:
        function: The function of a dataset.
    """
    definition = function.graph.as_graph_def()
    yield from definition.node
    for inner in definition.library.function:
        yield from inner.node_def


def captures_datasets(function: Any) -> bool:
    """Tells whether a traced function captures another dataset.

    Args:
        function: The function of a dataset.
    """
    return any(outer.dtype == tf.variant for outer, _ in function.graph.captures)


def state_of(function: Any) -> str | None:
    """Names an op by which an element may influence later elements, if there is one.

    Python code is not examined. Ops that advance Keras's seeds are allowed.

    Args:
        function: The function of a dataset.
    """
    definition = function.graph.as_graph_def()
    functions = {f.signature.name: list(f.node_def) for f in definition.library.function}
    seeds = all("seed_generator_state" in v.name for v in function.graph.variables)
    allowed = _READS | _DRAWS | _PYTHON | (_ASSIGNS if seeds else frozenset())

    def look(nodes: Any, in_branch: bool, seen: tuple[str, ...]) -> str | None:
        for node in nodes:
            op_def = _op_defs.get(node.op)
            if op_def is not None and op_def.is_stateful and node.op not in allowed:
                return str(node.op)
            if in_branch and node.op in _DRAWS | _ASSIGNS:
                return f"{node.op} in a branch"
            called = [node.op, *(a.func.name for a in node.attr.values() if a.HasField("func"))]
            called += [f.name for a in node.attr.values() for f in a.list.func]
            for name in called:
                if name in functions and name not in seen:
                    branches = in_branch or node.op in _BRANCHES
                    stateful_op = look(functions[name], branches, (*seen, name))
                    if stateful_op is not None:
                        return stateful_op
        return None

    return look(definition.node, False, ())


def varying_op(function: Any) -> str | None:
    """Names an op because of which two calls may differ.

    Args:
        function: The function of a dataset.
    """
    varying_ops = {node.op for node in nodes(function)} & (_DRAWS | _PYTHON | _ASSIGNS)
    return min(varying_ops, default=None)
