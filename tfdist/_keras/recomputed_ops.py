"""The ops of a call, and what among them cannot be repeated."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

from tfdist._keras.discovery import RANDOM_OPS
from tfdist.errors import ArgumentError

_DRAWS = ("Rng", "Stateful", "NonDeterministicInts")
_PYTHON = frozenset({"EagerPyFunc", "PyFunc", "PyFuncStateless"})
_WRITES = (
    "Assign",
    "ResourceScatter",
    "ResourceApply",
    "LookupTableInsert",
    "LookupTableImport",
)
_CALLS = frozenset({"If", "While", "Case", "StatefulPartitionedCall"})


def ops_of_thread(graph: Any) -> list[Any]:
    """Returns the list to which each op is added that this thread makes in a graph.

    `tf.distribute` traces replicas in threads that take turns, all in one graph. The list
    begins with the first call for a graph.

    Relies on `Graph._create_op_internal`, which makes all ops.

    Args:
        graph: A `tf.Graph`.
    """
    by_thread: dict[int, list[Any]] | None = getattr(graph, "_tfdist_ops", None)
    if by_thread is None:
        by_thread = graph._tfdist_ops = {}
        create = graph._create_op_internal

        def create_and_note(*args: Any, **kwargs: Any) -> Any:
            op = create(*args, **kwargs)
            by_thread.setdefault(threading.get_ident(), []).append(op)
            return op

        graph._create_op_internal = create_and_note
    return by_thread.setdefault(threading.get_ident(), [])


def refuse_unrepeatable(layer: Any, graph: Any, ops: Sequence[Any], writes: set[str]) -> None:
    """Refuses a layer whose second call would draw other numbers or change state again.

    Args:
        layer: A `keras.Layer`.
        graph: The graph in which it was called.
        ops: The ops that the call has made.
        writes: Names of the ops that assign `keras.Variable`s, which is allowed.

    Raises:
        ArgumentError: It would.
    """
    for kind, name in _types(graph, ops):
        # Calls of functions begin with "Stateful" too. `_types` lists what is inside of them.
        if kind in RANDOM_OPS or (kind.startswith(_DRAWS) and kind not in _CALLS):
            raise ArgumentError(
                "A layer whose activations are recomputed must draw random numbers by "
                "keras.random, from a SeedGenerator, so that they can be drawn again. "
                f"Received: layer {layer.name!r}, which draws by TensorFlow's {kind}. Leave "
                "it out of `layers` of tfdist.recompute, or change it."
            )
        if kind in _PYTHON:
            raise ArgumentError(
                "A layer whose activations are recomputed must compute in TensorFlow, so that "
                f"it can be repeated. Received: layer {layer.name!r}, which calls Python "
                f"by {kind}. Leave it out of `layers` of tfdist.recompute."
            )
        if kind.startswith(_WRITES) and name not in writes:
            raise ArgumentError(
                "A layer whose activations are recomputed must keep its state in "
                "keras.Variables, so that it changes once. Received: layer "
                f"{layer.name!r}, which changes a tf.Variable or table by {kind}. Use "
                "`self.add_weight`, or leave it out of `layers` of tfdist.recompute."
            )


def _types(graph: Any, ops: Sequence[Any]) -> Iterator[tuple[str, str | None]]:
    """Yields the types and names of ops, then the types in the functions that they call."""
    yield from ((op.type, op.name) for op in ops)
    called = [name for op in ops if op.type in _CALLS for name in _functions(op.node_def)]
    if not called:
        return
    library = {f.signature.name: f for f in graph.as_graph_def().library.function}
    visited: set[str] = set()
    while called:
        name = called.pop()
        if name in visited or name not in library:
            continue
        visited.add(name)
        for node in library[name].node_def:
            if not node.op.startswith(_WRITES):  # those of keras.Variables are refused before
                yield node.op, None
            called += _functions(node)


def _functions(node: Any) -> list[str]:
    named = [value.func.name for value in node.attr.values() if value.HasField("func")]
    listed = [f.name for value in node.attr.values() for f in value.list.func]
    return [*named, *listed]
