"""The graph of a dataset's function, built again, with what it calls in its place.

Shapes are inferred anew. `Tensor.set_shape` is a claim that TensorFlow does not check, so what
is proven must not rest on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf
from tensorflow.python.framework.func_graph import FuncGraph as _FuncGraph
from tensorflow.python.framework.function_def_to_graph import (
    function_def_to_graph as _to_graph,
)
from tensorflow.python.ops.handle_data_util import copy_handle_data as _copy_handle_data

CALLS = frozenset({"PartitionedCall", "StatefulPartitionedCall"})


class Inlined:
    """The graph of a function.

    Args:
        function: The function of a dataset.
        shapes: The proven shape of each argument.

    Attributes:
        elements: The tensors of the arguments, without what is captured.
        ops: All operations, each after those that it reads from.
        outputs: The tensors that are returned.

    Raises:
        ValueError: Operations do not fit to the proven shapes.
    """

    def __init__(self, function: Any, shapes: Sequence[Any]) -> None:
        graph = function.graph
        definition = graph.as_graph_def()
        self._library = {f.signature.name: f for f in definition.library.function}
        captures = {inner.name: outer for outer, inner in graph.captures}
        given = iter(shapes)
        self._resources: dict[str, Any] = {}
        self._into = _FuncGraph("inlined")
        with self._into.as_default():
            placed = []
            for old in graph.inputs:
                outer = captures.get(old.name)
                shape = next(given, None) if outer is None else outer.shape
                new = tf.compat.v1.placeholder(old.dtype, shape)
                _copy_handle_data(old if outer is None else outer, new)
                placed.append(new)
                if old.dtype == tf.resource:
                    self._resources[new.name] = outer
            self.outputs = self._copied(graph, placed)
        pairs = zip(graph.inputs, placed, strict=True)
        self.elements = [new for old, new in pairs if old.name not in captures]
        self.ops = self._into.get_operations()

    def _copied(self, graph: Any, given: Sequence[Any]) -> list[Any]:
        """Copies the operations of a graph, and gives the tensors that it returns."""
        known = {old.name: new for old, new in zip(graph.inputs, given, strict=True)}
        for op in graph.get_operations():
            if op.outputs and op.outputs[0].name in known:
                continue
            inputs = [known[t.name] for t in op.inputs]
            if op.type in CALLS and op.get_attr("f").name in self._library:
                called = _to_graph(self._library[op.get_attr("f").name])
                outputs = self._copied(called, inputs)
            else:
                attributes = {k: v for k, v in op.node_def.attr.items() if k[0] != "_"}
                dtypes = [t.dtype for t in op.outputs]
                copy = self._into.create_op(
                    op.type, inputs, dtypes, attrs=attributes, op_def=op.op_def
                )
                outputs = copy.outputs
                if op.type == "LookupTableFindV2" and self._is_of_single_values(copy):
                    outputs[0].set_shape(inputs[1].shape)
            known.update({old.name: new for old, new in zip(op.outputs, outputs, strict=True)})
        return [known[t.name] for t in graph.outputs]

    def _is_of_single_values(self, lookup: Any) -> bool:
        """Tells whether a table has a single value for a single key, by its contents."""
        table = self._resources.get(lookup.inputs[0].name)
        if not isinstance(table, tf.__internal__.EagerTensor):
            return False
        kinds = {"Tkeys": lookup.inputs[1].dtype, "Tvalues": lookup.inputs[2].dtype}
        with tf.init_scope():
            found = tf.raw_ops.LookupTableExportV2(table_handle=table, **kinds)
        return bool(found[0].shape.rank == found[1].shape.rank == 1)
