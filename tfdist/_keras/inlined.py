"""Copies the graph of a dataset's function, with the functions that it calls inlined.

TensorFlow infers the shapes of the copy again, also in branches and loops. `Tensor.set_shape`
is a claim that TensorFlow does not check, so a proof must not depend on it.
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
_MOST_ROUNDS = 4  # of inference, until the shapes of a loop's variables do not change


class Inlined:
    """The inlined graph of a function.

    Args:
        function: The function of a dataset.
        shapes: The proven shape of each argument.

    Attributes:
        elements: The tensors of the arguments, without captured tensors.
        ops: All operations, each after its inputs.
        outputs: The returned tensors.
        resources: The captured resources, by the names of their tensors.

    Raises:
        ValueError: An operation does not fit the proven shapes.
    """

    def __init__(self, function: Any, shapes: Sequence[Any]) -> None:
        graph = function.graph
        definition = graph.as_graph_def()
        self._library = {f.signature.name: f for f in definition.library.function}
        captures = {inner.name: outer for outer, inner in graph.captures}
        argument_shapes = iter(shapes)
        self.resources: dict[str, Any] = {}
        self._into = _FuncGraph("inlined")
        with self._into.as_default():
            placed = []
            for old in graph.inputs:
                outer = captures.get(old.name)
                # An argument gets its proven shape. The shape in its own graph may come from
                # `set_shape`.
                shape = next(argument_shapes, None) if outer is None else outer.shape
                new = tf.compat.v1.placeholder(old.dtype, shape)
                _copy_handle_data(old if outer is None else outer, new)
                placed.append(new)
                if old.dtype == tf.resource:
                    self.resources[new.name] = outer
            self.outputs = self._copied(graph, placed)
        pairs = zip(graph.inputs, placed, strict=True)
        self.elements = [new for old, new in pairs if old.name not in captures]
        self.ops = self._into.get_operations()

    def _copied(self, graph: Any, arguments: Sequence[Any]) -> list[Any]:
        """Copies the operations of a graph, and returns the copies of its outputs."""
        copies = {old.name: new for old, new in zip(graph.inputs, arguments, strict=True)}
        for op in graph.get_operations():
            # The placeholder of an argument.
            if op.outputs and op.outputs[0].name in copies:
                continue
            inputs = [copies[t.name] for t in op.inputs]
            if op.type in CALLS and op.get_attr("f").name in self._library:
                called = _to_graph(self._library[op.get_attr("f").name])
                outputs = self._copied(called, inputs)
            else:
                # Attributes that begin with an underscore are notes of TensorFlow's, such as
                # claims about shapes.
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
            copies.update({old.name: new for old, new in zip(op.outputs, outputs, strict=True)})
        return [copies[t.name] for t in graph.outputs]

    def _shapes_of(self, op: Any, inputs: Sequence[Any]) -> Any:
        """Infers the output shapes of an operation that has them as an attribute.

        TensorFlow does not infer them, and the attribute may come from `set_shape`. Shapes that
        cannot be inferred here are unknown.
        """
        shapes = [tf.TensorShape(None)] * len(op.outputs)
        if op.type in ("If", "StatelessIf"):
            branches = [op.get_attr("then_branch"), op.get_attr("else_branch")]
            shapes = self._of_branches(branches, inputs[1:])
        elif op.type in ("Case", "StatelessCase"):
            shapes = self._of_branches(op.get_attr("branches"), inputs[1:])
        elif op.type in ("While", "StatelessWhile"):
            shapes = self._of_loop(op.get_attr("body"), inputs)
        value = tf.compat.v1.AttrValue.ListValue(shape=[shape.as_proto() for shape in shapes])
        return tf.compat.v1.AttrValue(list=value)

    def _of_branches(self, branches: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        """Infers the output shapes of an operation that runs one of several branches."""
        shapes = [t.shape for t in inputs]
        of_branches = [self._inferred(branch.name, inputs, shapes) for branch in branches]
        return [in_common(of_output) for of_output in zip(*of_branches, strict=True)]

    def _of_loop(self, body: Any, inputs: Sequence[Any]) -> list[Any]:
        """Infers the shapes of a loop's variables.

        A shape must hold before and after each iteration. So the shapes of the body's outputs
        are merged into those of its inputs until nothing changes.
        """
        shapes = [t.shape for t in inputs]
        for _ in range(_MOST_ROUNDS):
            after = self._inferred(body.name, inputs, shapes)
            common = [in_common(pair) for pair in zip(shapes, after, strict=True)]
            if [s.as_proto() for s in common] == [s.as_proto() for s in shapes]:
                return shapes
            shapes = common
        return [tf.TensorShape(None)] * len(inputs)

    def _inferred(self, name: str, inputs: Sequence[Any], shapes: Sequence[Any]) -> list[Any]:
        """Infers the output shapes of a function, in a temporary graph."""
        outer_graph, outer_resources = self._into, self.resources
        self._into = _FuncGraph("branch")
        try:
            with self._into.as_default():
                arguments = [
                    tf.compat.v1.placeholder(old.dtype, shape)
                    for old, shape in zip(inputs, shapes, strict=True)
                ]
                pairs = list(zip(inputs, arguments, strict=True))
                for old, new in pairs:
                    _copy_handle_data(old, new)
                self.resources = {new.name: outer_resources.get(old.name) for old, new in pairs}
                graph = _to_graph(self._library[name])
                return [t.shape for t in self._copied(graph, arguments)]
        finally:
            self._into, self.resources = outer_graph, outer_resources

    def _is_of_single_values(self, lookup: Any) -> bool:
        """Returns whether a table has a single value for a single key, by its contents."""
        table = self.resources.get(lookup.inputs[0].name)
        if not isinstance(table, tf.__internal__.EagerTensor):
            return False
        kinds = {"Tkeys": lookup.inputs[1].dtype, "Tvalues": lookup.inputs[2].dtype}
        with tf.init_scope():
            exported = tf.raw_ops.LookupTableExportV2(table_handle=table, **kinds)
        return bool(exported[0].shape.rank == exported[1].shape.rank == 1)


class InlinedGraphs:
    """Caches the inlined graphs of a pipeline's functions, since several proofs read each."""

    def __init__(self) -> None:
        # The functions are stored too: the id of a deleted function could be used again.
        self._graphs: dict[tuple[Any, ...], tuple[Any, Inlined]] = {}

    def of(self, function: Any, shapes: Sequence[Any]) -> Inlined:
        """Returns the inlined graph of a function.

        Args:
            function: As in `Inlined`.
            shapes: As in `Inlined`.

        Raises:
            ValueError: As in `Inlined`.
        """
        key = id(function), *map(str, shapes)
        if key not in self._graphs:
            self._graphs[key] = function, Inlined(function, shapes)
        return self._graphs[key][1]


def in_common(shapes: Sequence[Any]) -> Any:
    """Returns the most specific shape that is compatible with each of some shapes."""
    first, *others = shapes
    for shape in others:
        first = first.most_specific_compatible_shape(shape)
    return first
