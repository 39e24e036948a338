"""The graph of a dataset's function, built again, with what it calls in its place.

Shapes are inferred anew, also in branches and loops. `Tensor.set_shape` is a claim that
TensorFlow does not check, so what is proven must not rest on it.
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
_MOST_ROUNDS = 4  # until the shapes of a loop's variables stay what they are


class Inlined:
    """The graph of a function.

    Args:
        function: The function of a dataset.
        shapes: The proven shape of each argument.

    Attributes:
        elements: The tensors of the arguments, without what is captured.
        ops: All operations, each after those that it reads from.
        outputs: The tensors that are returned.
        resources: The captured resource of each tensor's name.

    Raises:
        ValueError: Operations do not fit to the proven shapes.
    """

    def __init__(self, function: Any, shapes: Sequence[Any]) -> None:
        graph = function.graph
        definition = graph.as_graph_def()
        self._library = {f.signature.name: f for f in definition.library.function}
        captures = {inner.name: outer for outer, inner in graph.captures}
        given = iter(shapes)
        self.resources: dict[str, Any] = {}
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
                    self.resources[new.name] = outer
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
                if "output_shapes" in attributes:
                    attributes["output_shapes"] = self._shapes_of(op, inputs)
                dtypes = [t.dtype for t in op.outputs]
                copy = self._into.create_op(
                    op.type, inputs, dtypes, attrs=attributes, op_def=op.op_def
                )
                outputs = copy.outputs
                if op.type == "LookupTableFindV2" and self._is_of_single_values(copy):
                    outputs[0].set_shape(inputs[1].shape)
            known.update({old.name: new for old, new in zip(op.outputs, outputs, strict=True)})
        return [known[t.name] for t in graph.outputs]

    def _shapes_of(self, op: Any, inputs: Sequence[Any]) -> Any:
        """Infers the output shapes of an operation, which it holds as an attribute itself."""
        shapes = [tf.TensorShape(None)] * len(op.outputs)
        if op.type in ("If", "StatelessIf"):
            branches = [op.get_attr("then_branch"), op.get_attr("else_branch")]
            shapes = self._of_branches(branches, inputs[1:])
        elif op.type in ("Case", "StatelessCase"):
            shapes = self._of_branches(op.get_attr("branches"), inputs[1:])
        elif op.type in ("While", "StatelessWhile"):
            shapes = self._of_loop(op.get_attr("body"), inputs)
        kept = tf.compat.v1.AttrValue.ListValue(shape=[shape.as_proto() for shape in shapes])
        return tf.compat.v1.AttrValue(list=kept)

    def _of_branches(self, branches: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        given = [t.shape for t in inputs]
        found = [self._inferred(branch.name, inputs, given) for branch in branches]
        return [in_common(shapes) for shapes in zip(*found, strict=True)]

    def _of_loop(self, body: Any, inputs: Sequence[Any]) -> list[Any]:
        shapes = [t.shape for t in inputs]
        for _ in range(_MOST_ROUNDS):
            found = self._inferred(body.name, inputs, shapes)
            merged = [in_common(pair) for pair in zip(shapes, found, strict=True)]
            if [s.as_proto() for s in merged] == [s.as_proto() for s in shapes]:
                return shapes
            shapes = merged
        return [tf.TensorShape(None)] * len(inputs)

    def _inferred(self, name: str, inputs: Sequence[Any], shapes: Sequence[Any]) -> list[Any]:
        """Infers what shapes a function returns, in a graph that is not kept."""
        kept = self._into, self.resources
        self._into = _FuncGraph("branch")
        try:
            with self._into.as_default():
                given = [
                    tf.compat.v1.placeholder(old.dtype, shape)
                    for old, shape in zip(inputs, shapes, strict=True)
                ]
                pairs = list(zip(inputs, given, strict=True))
                for old, new in pairs:
                    _copy_handle_data(old, new)
                self.resources = {new.name: kept[1].get(old.name) for old, new in pairs}
                return [t.shape for t in self._copied(_to_graph(self._library[name]), given)]
        finally:
            self._into, self.resources = kept

    def _is_of_single_values(self, lookup: Any) -> bool:
        """Returns whether a table has a single value for a single key, by its contents."""
        table = self.resources.get(lookup.inputs[0].name)
        if not isinstance(table, tf.__internal__.EagerTensor):
            return False
        kinds = {"Tkeys": lookup.inputs[1].dtype, "Tvalues": lookup.inputs[2].dtype}
        with tf.init_scope():
            found = tf.raw_ops.LookupTableExportV2(table_handle=table, **kinds)
        return bool(found[0].shape.rank == found[1].shape.rank == 1)


def in_common(shapes: Sequence[Any]) -> Any:
    """Gives the shape that is known if any one of some shapes may be the right one."""
    first, *others = shapes
    for shape in others:
        first = first.most_specific_compatible_shape(shape)
    return first
