"""Finds the calls of layers whose rows are not the examples of the batch.

A layer may be called with positions folded into the batch (`reshape(x, (-1, d))`), or with a
tensor that is the same for all examples (`Embedding(arange(T))`, which is then broadcast). A
row of such a call is not an example. So the model is traced once with a prime number of
examples, and a size that is a multiple of this prime comes from the batch.
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
    """How the batch enters the calls of a model's layers.

    Attributes:
        rows: The number of rows of an example, by the id of a layer and the number of its call.
        around: The layers that are called without the batch, by id. The value is the innermost
            layer that contains all calls and is itself called with the batch, or None for the
            model.
    """

    rows: dict[tuple[int, int], int] = field(default_factory=dict)
    around: dict[int, Any] = field(default_factory=dict)

    def of(self, layer: Any, call: int) -> int:
        """Returns the number of rows of an example in a call.

        Args:
            layer: The layer that is called.
            call: The number of its call in a pass.
        """
        return self.rows.get((id(layer), call), 1)

    def without_batch(self, units: Sequence[Any], around: Any) -> list[Any]:
        """Lists the weights of layers that are called without the batch.

        Args:
            units: The layers whose calls are recorded.
            around: A value of the attribute `around`: the layer that is run again for these
                weights, or None for the model.
        """
        without = [u for u in units if self.around.get(id(u), self) is around]
        return [v for unit in without for v in unit.trainable_variables]


def foldings(model: Any, units: Sequence[Any], x: Any) -> Foldings:
    """Finds how the batch enters the calls of layers. The result is cached with the model.

    Args:
        model: A compiled, built `keras.Model`.
        units: The layers whose calls are recorded.
        x: A batch of inputs.

    Raises:
        ArgumentError: A layer is called in a loop or function of its own.
    """
    key = tuple(id(v) for v in model.trainable_variables)
    cached_key, cached = _keras.attached(model).foldings
    if cached_key != key:
        cached = _traced_foldings(model, units, x)
        _keras.attached(model).foldings = key, cached
    result: Foldings = cached
    return result


def found_without_batch(model: Any) -> list[str]:
    """Lists the names of layers that `foldings` has found to be called without the batch.

    Args:
        model: A `keras.Model`.
    """
    _, cached = _keras.attached(model).foldings
    around = {} if cached is None else cached.around
    return [layer.name for layer in _keras.layers_of(model) if id(layer) in around]


@dataclass
class _TracedCall:
    """One call of a layer.

    Attributes:
        layer: The layer.
        around: The calls in which it was called, the outermost first.
        rows: The rows of an example in its outputs, 0 without a batch, None if unknown.
    """

    layer: Any
    around: list[_TracedCall]
    rows: int | None = None


def _traced_foldings(model: Any, units: Sequence[Any], x: Any) -> Foldings:
    leaves = tf.nest.flatten(x)
    if not all(_has_rows(leaf) for leaf in leaves):
        return Foldings()
    calls = _traced(model, units, x)
    result = Foldings()
    for unit in units:
        of_unit = [call for call in calls if call.layer is unit]
        for number, call in enumerate(of_unit):
            if call.rows is not None and call.rows > 0:
                result.rows[id(unit), number] = call.rows
        if any(call.rows == 0 for call in of_unit):
            result.around[id(unit)] = _innermost(of_unit)
    return result


def _has_rows(leaf: Any) -> bool:
    if isinstance(leaf, tf.RaggedTensor | tf.SparseTensor):
        return False
    return len(leaf.shape) > 0


def _innermost(calls: Sequence[_TracedCall]) -> Any:
    """Returns the innermost layer with a batch that contains all calls, or None."""
    for layer in [call.layer for call in reversed(calls[0].around)]:
        outer_calls = [next((a for a in c.around if a.layer is layer), None) for c in calls]
        if all(outer is not None and outer.rows == 1 for outer in outer_calls):
            return layer
    return None


def _traced(model: Any, units: Sequence[Any], x: Any) -> list[_TracedCall]:
    """Traces the model, and lists the calls of its layers; none if it cannot be traced."""
    ids = {id(unit) for unit in units}
    watched = list(units)
    for layer in _keras.layers_of(model)[1:]:
        inner = {id(part) for part in _keras.layers_of(layer)[1:]}
        if id(layer) not in ids and inner & ids:
            watched.append(layer)
    calls: list[_TracedCall] = []
    open_calls: list[_TracedCall] = []
    graphs: list[Any] = []
    # An error in the inner graph of a loop would leave TensorFlow's trace half done. So layers
    # within loops are only collected here, and refused after the trace.
    in_loops: list[Any] = []

    def through(layer: Any) -> Callable[..., Any]:
        def call_through(call: Any, *args: Any, **kwargs: Any) -> Any:
            traced = _TracedCall(layer, list(open_calls))
            calls.append(traced)
            open_calls.append(traced)
            try:
                outputs = call(*args, **kwargs)
            finally:
                open_calls.pop()
            if tf.compat.v1.get_default_graph() is not graphs[0]:
                in_loops.append(layer)
            traced.rows = _rows_of(tf.nest.flatten(outputs))
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
    except Exception:  # the model may accept a fixed number of examples only
        calls = []
    if in_loops:
        raise _in_a_loop(in_loops[0])
    return calls


def _rows_of(outputs: Sequence[Any]) -> int | None:
    sizes = {out.shape[0] if len(out.shape) else 0 for out in outputs}
    if None in sizes or len({size % _EXAMPLES for size in sizes}) > 1 or len(sizes) > 1:
        return None
    # Only the batch brings the prime into a size. So the quotient is the number of rows of an
    # example.
    (size,) = sizes
    return int(size) // _EXAMPLES if size % _EXAMPLES == 0 else 0


def _in_a_loop(layer: Any) -> ArgumentError:
    return ArgumentError(
        "A layer with weights must be called by Python code of the model, not in a loop, "
        "branch or function of TensorFlow, where its calls cannot be recorded. Received: the "
        f"layer {layer.name!r} of type {type(layer).__name__}, called in one (keras.ops.map, "
        "while_loop, scan, tf.function). Give it all positions at once, with the batch as the "
        "first axis, or use keras.layers.TimeDistributed."
    )
