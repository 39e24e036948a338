"""Where the batch is in what layers are called with: as rows, folded with positions, or not.

A layer may be called with positions folded into the batch (`reshape(x, (-1, d))`), or with what
is the same for all examples (`Embedding(arange(T))`, whose rows are then broadcast). A row of
such a call is no example. So the model is traced once with a number of examples that nothing
else has by chance, and the calls' shapes are looked at.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import tensorflow as tf

from tfdist import _keras
from tfdist._keras import layers as keras_layers
from tfdist.errors import ArgumentError

Tensor = Any
_EXAMPLES = 1009  # a prime: sizes that are multiples of it come from the batch


@dataclass(frozen=True)
class Foldings:
    """What was found of a model's layers.

    Attributes:
        rows: By layer and number of its call how many rows an example has there.
        around: For a layer whose output at some call has no batch, by its id: the innermost
            layer around these calls that is called with the batch, or None for the model.
    """

    rows: dict[tuple[int, int], int] = field(default_factory=dict)
    around: dict[int, Any] = field(default_factory=dict)

    def of(self, layer: Any, call: int) -> int:
        """Gives the rows of an example.

        Args:
            layer: That is called.
            call: The number of its call in a pass.
        """
        return self.rows.get((id(layer), call), 1)

    def without_batch(self, units: Sequence[Any], around: Any) -> list[Any]:
        """Lists the weights of layers that are called without the batch.

        Args:
            units: The layers whose calls are recorded.
            around: What is run again for these weights, a layer or None for the model.
        """
        chosen = [u for u in units if self.around.get(id(u), self) is around]
        return [v for unit in chosen for v in unit.trainable_variables]


def foldings(model: Any, units: Sequence[Any], x: Any) -> Foldings:
    """Finds where the batch is in the calls of layers; what is found is kept.

    Args:
        model: A compiled, built `keras.Model`.
        units: The layers whose calls are recorded.
        x: A batch of inputs.

    Raises:
        ArgumentError: A layer is called in a loop or function of its own.
    """
    key = tuple(id(v) for v in model.trainable_variables)
    known, found = _keras.attached(model).foldings
    if known != key:
        found = _found(model, units, x)
        _keras.attached(model).foldings = key, found
    result: Foldings = found
    return result


def found_without_batch(model: Any) -> list[str]:
    """Names the layers that `foldings` has found to be called without the batch.

    Args:
        model: A `keras.Model`.
    """
    _, found = _keras.attached(model).foldings
    around = {} if found is None else found.around
    return [layer.name for layer in _keras.layers_of(model) if id(layer) in around]


@dataclass
class _SeenCall:
    """One call of a layer.

    Attributes:
        layer: That was called.
        around: The calls in which it was called, the outermost first.
        rows: Rows of an example in its outputs, 0 without a batch, None if unknown.
    """

    layer: Any
    around: list[_SeenCall]
    rows: int | None = None


def _found(model: Any, units: Sequence[Any], x: Any) -> Foldings:
    leaves = tf.nest.flatten(x)
    if model.run_eagerly or not all(_has_rows(leaf) for leaf in leaves):
        return Foldings()
    calls = _traced(model, units, x)
    result = Foldings()
    for unit in units:
        mine = [call for call in calls if call.layer is unit]
        for number, call in enumerate(mine):
            if call.rows is not None and call.rows > 0:
                result.rows[id(unit), number] = call.rows
        if any(call.rows == 0 for call in mine):
            result.around[id(unit)] = _common(mine)
    return result


def _has_rows(leaf: Any) -> bool:
    if isinstance(leaf, tf.RaggedTensor | tf.SparseTensor):
        return False
    return len(leaf.shape) > 0


def _common(calls: Sequence[_SeenCall]) -> Any:
    """Gives the innermost layer with a batch that all calls are in, or None."""
    for layer in [call.layer for call in reversed(calls[0].around)]:
        within = [next((a for a in c.around if a.layer is layer), None) for c in calls]
        if all(around is not None and around.rows == 1 for around in within):
            return layer
    return None


def _traced(model: Any, units: Sequence[Any], x: Any) -> list[_SeenCall]:
    ids = {id(unit) for unit in units}
    watched = list(units)
    for layer in _keras.layers_of(model)[1:]:
        inner = {id(part) for part in _keras.layers_of(layer)[1:]}
        if id(layer) not in ids and inner & ids:
            watched.append(layer)
    calls: list[_SeenCall] = []
    now: list[_SeenCall] = []
    graphs: list[Any] = []
    in_loops: list[Any] = []  # refused when the trace is over: TensorFlow tidies up in it

    def through(layer: Any) -> Callable[..., Any]:
        def call_through(call: Any, *args: Any, **kwargs: Any) -> Any:
            seen = _SeenCall(layer, list(now))
            calls.append(seen)
            now.append(seen)
            try:
                outputs = call(*args, **kwargs)
            finally:
                now.pop()
            if tf.compat.v1.get_default_graph() is not graphs[0]:
                in_loops.append(layer)
            seen.rows = _rows_of(tf.nest.flatten(outputs))
            return outputs

        return call_through

    def trace(x: Any) -> None:
        graphs.append(tf.compat.v1.get_default_graph())
        with contextlib.ExitStack() as stack:
            stack.enter_context(_keras.on_replica(None))
            for layer in watched:
                stack.enter_context(keras_layers.called_through(layer, through(layer)))
            model(x, training=True)

    def spec(leaf: Any) -> tf.TensorSpec:
        return tf.TensorSpec([_EXAMPLES, *leaf.shape[1:]], leaf.dtype)

    try:
        with _keras.keeping_variable_scope():
            function = tf.function(trace, autograph=False)
            function.get_concrete_function(tf.nest.map_structure(spec, x))
    except Exception:  # a model that takes no other number of examples
        calls = []
    if in_loops:
        raise _in_a_loop(in_loops[0])
    return calls


def _rows_of(outputs: Sequence[Any]) -> int | None:
    sizes = {out.shape[0] if len(out.shape) else 0 for out in outputs}
    if None in sizes or len({size % _EXAMPLES for size in sizes}) > 1 or len(sizes) > 1:
        return None
    (size,) = sizes
    return int(size) // _EXAMPLES if size % _EXAMPLES == 0 else 0


def _in_a_loop(layer: Any) -> ArgumentError:
    return ArgumentError(
        "A layer with weights must be called by Python code of the model, where each call can "
        "be seen, and not in a loop, branch or function of TensorFlow. Received: the layer "
        f"{layer.name!r} of type {type(layer).__name__}, called in one (keras.ops.map, "
        "while_loop, scan, tf.function). Give it all positions at once, with the batch as the "
        "first axis, or use keras.layers.TimeDistributed."
    )
