"""Whether a function of a `tf.data.Dataset` lets an example have a part in others."""

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
    """Lists the ops of a traced function, and of what it calls.

    Args:
        function: Of a dataset.
    """
    definition = function.graph.as_graph_def()
    yield from definition.node
    for inner in definition.library.function:
        yield from inner.node_def


def captures_datasets(function: Any) -> bool:
    """Tells whether a traced function uses a dataset that it was not given.

    Args:
        function: Of a dataset.
    """
    return any(outer.dtype == tf.variant for outer, _ in function.graph.captures)


def state_of(function: Any) -> str | None:
    """Names an op by which an element may change what becomes of later ones.

    Python code is not looked into; seeds of Keras may move on.

    Args:
        function: Of a dataset.
    """
    definition = function.graph.as_graph_def()
    functions = {f.signature.name: list(f.node_def) for f in definition.library.function}
    seeds = all("seed_generator_state" in v.name for v in function.graph.variables)
    allowed = _READS | _DRAWS | _PYTHON | (_ASSIGNS if seeds else frozenset())

    def look(nodes: Any, in_branch: bool, seen: tuple[str, ...]) -> str | None:
        for node in nodes:
            known = _op_defs.get(node.op)
            if known is not None and known.is_stateful and node.op not in allowed:
                return str(node.op)
            if in_branch and node.op in _DRAWS | _ASSIGNS:
                return f"{node.op} in a branch"
            called = [node.op, *(a.func.name for a in node.attr.values() if a.HasField("func"))]
            called += [f.name for a in node.attr.values() for f in a.list.func]
            for name in called:
                if name in functions and name not in seen:
                    branches = in_branch or node.op in _BRANCHES
                    found = look(functions[name], branches, (*seen, name))
                    if found is not None:
                        return found
        return None

    return look(definition.node, False, ())


def untried(function: Any) -> str | None:
    """Names an op because of which a function may give another result the second time.

    Args:
        function: Of a dataset.
    """
    found = {node.op for node in nodes(function)} & (_DRAWS | _PYTHON | _ASSIGNS)
    return min(found, default=None)


def mixes_rows(one: Any) -> bool:
    """Tries a map on a batch, and on one of which half of the rows are others.

    Args:
        one: A dataset that maps batches of tensors.
    """
    source = one._inputs()[0]
    with contextlib.suppress(tf.errors.OpError):  # too large to be written down
        source = copied(source)  # so that no shuffle of the user's moves on
    batch = next(iter(source))
    leaves = tf.nest.flatten(batch)
    count = int(leaves[0].shape[0])
    if any(int(leaf.shape[0]) != count for leaf in leaves):
        return True
    sizes = [spec.shape[1:] for spec in tf.nest.flatten(source.element_spec)]
    made_sizes = [spec.shape[1:] for spec in tf.nest.flatten(one.element_spec)]
    are_known = (all(s.is_fully_defined() for s in each) for each in (sizes, made_sizes))
    if next(are_known) and not next(are_known):
        return True
    kept = np.arange(count) % 2 == 0

    def changed(leaf: Any) -> Any:
        moved = tf.gather(leaf, (np.arange(count) + count // 2) % count)
        if leaf.dtype.is_floating:
            moved = moved * 3 + 1
        return tf.where(tf.reshape(kept, [-1] + [1] * (leaf.shape.rank - 1)), leaf, moved)

    def made(batch: Any) -> list[Any]:
        tensors = _structure.to_tensor_list(source.element_spec, batch)
        found = one._map_func.function(*tensors)
        given = _structure.from_compatible_tensor_list(one._map_func.output_structure, found)
        leaves: list[Any] = tf.nest.flatten(given)
        return leaves

    pairs = zip(made(batch), made(tf.nest.map_structure(changed, batch)), strict=True)
    return not all(_agree(a, b, count, kept) for a, b in pairs)


def _agree(one: Any, other: Any, count: int, kept: Any) -> bool:
    if not isinstance(one, tf.Tensor) or one.shape.rank == 0 or one.shape != other.shape:
        return False
    if int(one.shape[0]) != count:
        return False
    mine, others = one.numpy()[kept], other.numpy()[kept]
    if one.dtype.is_floating:
        mine, others = mine.astype(np.float64), others.astype(np.float64)
        return bool(np.allclose(mine, others, rtol=1e-4, atol=1e-6, equal_nan=True))
    return bool((mine == others).all())
