"""Checks whether a function of a `tf.data.Dataset` lets an example influence others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.data.util import structure as _structure
from tensorflow.python.framework import op_def_registry as _op_defs

from tfdist._keras.datasets import copied
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


def untried(function: Any) -> str | None:
    """Names an op because of which two calls may differ, so that `mixes_rows` cannot test it.

    Args:
        function: The function of a dataset.
    """
    varying_ops = {node.op for node in nodes(function)} & (_DRAWS | _PYTHON | _ASSIGNS)
    return min(varying_ops, default=None)


def mixes_rows(one: Any) -> bool:
    """Tells whether a row of a mapped batch depends on other rows.

    It applies the map to a batch, and to the batch with half of its rows changed. The results
    of the other half must stay the same.

    Args:
        one: A dataset that maps batches of tensors.
    """
    source = one._inputs()[0]
    with contextlib.suppress(tf.errors.OpError):  # raised for a dataset that is too large
        source = copied(source)  # the state of the user's shuffles must not change
    batch = next(iter(source))
    leaves = tf.nest.flatten(batch)
    count = int(leaves[0].shape[0])
    if any(int(leaf.shape[0]) != count for leaf in leaves):
        return True
    sizes = [spec.shape[1:] for spec in tf.nest.flatten(source.element_spec)]
    mapped_sizes = [spec.shape[1:] for spec in tf.nest.flatten(one.element_spec)]
    are_defined = (all(s.is_fully_defined() for s in each) for each in (sizes, mapped_sizes))
    if next(are_defined) and not next(are_defined):
        return True
    unchanged = np.arange(count) % 2 == 0

    def change(leaf: Any) -> Any:
        other_rows = tf.gather(leaf, (np.arange(count) + count // 2) % count)
        if leaf.dtype.is_floating:
            other_rows = other_rows * 3 + 1
        mask = tf.reshape(unchanged, [-1] + [1] * (leaf.shape.rank - 1))
        return tf.where(mask, leaf, other_rows)

    def mapped(batch: Any) -> list[Any]:
        tensors = _structure.to_tensor_list(source.element_spec, batch)
        outputs = one._map_func.function(*tensors)
        structure = one._map_func.output_structure
        elements = _structure.from_compatible_tensor_list(structure, outputs)
        leaves: list[Any] = tf.nest.flatten(elements)
        return leaves

    pairs = zip(mapped(batch), mapped(tf.nest.map_structure(change, batch)), strict=True)
    return not all(_rows_agree(a, b, count, unchanged) for a, b in pairs)


def _rows_agree(first: Any, second: Any, count: int, rows: Any) -> bool:
    if not isinstance(first, tf.Tensor) or first.shape.rank == 0:
        return False
    if first.shape != second.shape or int(first.shape[0]) != count:
        return False
    a, b = first.numpy()[rows], second.numpy()[rows]
    if first.dtype.is_floating:
        a, b = a.astype(np.float64), b.astype(np.float64)
        return bool(np.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True))
    return bool((a == b).all())
