"""Layers that keep their inputs only, and compute their activations again in the backward pass.

(Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.) Keras's own
`keras.remat` draws other random numbers in the second pass, and changes variables twice.

A layer's `call` runs twice while a step is traced. The first pass is the usual one. Its results
go on through `tf.custom_gradient`, so the backward pass does not lead into it. The second pass
runs in the backward pass, in a scope in which each variable has the value that it had in the
first pass, and in which assignments change nothing. So seeds give the same random numbers, and
moving statistics are updated once.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.common import global_state as _global_state
from tensorflow.python.eager import record as _record

from tfdist._keras.parallel_layers import ParallelCall
from tfdist._keras.recomputed_ops import ops_of_thread, refuse_unrepeatable
from tfdist._keras.recomputed_state import FirstPass, SecondPass
from tfdist._keras.regathering import LayerWeights, frees_weights
from tfdist._keras.second_passes import CallSurroundings, after, has_gradient, tied
from tfdist._keras.served import StepScope
from tfdist.errors import ArgumentError

Tensor = Any
Call = Callable[..., Any]
_NAMES = ("call", "quantized_call")  # Keras calls the second one of a quantized layer


def set_recomputed(layer: Any, recomputed: bool) -> None:
    """Makes a layer compute its activations again in the backward pass, or keep them.

    Relies on `Layer.__call__`, which looks up `call` on the instance.

    Args:
        layer: A `keras.Layer`.
        recomputed: Whether its activations are computed again.
    """
    for name in _NAMES:
        if isinstance(vars(layer).get(name), _RecomputedCall):
            del vars(layer)[name]
        if recomputed:
            # Not with `setattr`, which Keras watches for layers and variables.
            vars(layer)[name] = _RecomputedCall(layer, getattr(layer, name))


def recomputed_calls(model: Any) -> list[Any]:
    """Lists the objects that replace the calls of layers that `set_recomputed` has changed.

    Args:
        model: A `keras.Layer` or model.
    """
    calls = (vars(layer).get(_NAMES[0]) for layer in model._flatten_layers())
    chosen = [call for call in calls if isinstance(call, _RecomputedCall)]
    return [call for call in chosen if not call.is_optional]


class _RecomputedCall:
    """Takes the place of a layer's `call`."""

    is_optional = False

    def __init__(self, layer: Any, original: Call) -> None:
        functools.update_wrapper(self, original)
        self.layer = layer
        self._original = original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves = tf.nest.flatten((args, kwargs), expand_composites=True)
        weights = LayerWeights.of(self.layer)
        if _is_trained(leaves) and (weights.backings or not self.is_optional):
            call = self._original
            return _recomputed(self.layer, call, args, kwargs, weights, self.is_optional)
        wholes = weights.gathered_after([t for t in leaves if tf.is_symbolic_tensor(t)])
        with weights.used(wholes):
            return self._original(*args, **kwargs)


class _RegatheringCall(_RecomputedCall):
    """Takes the place of a layer's `call` while weights are in parts."""

    is_optional = True


@contextlib.contextmanager
def regathered(model: Any) -> Iterator[None]:
    """Makes a context in which layers free whole weights between forward and backward pass.

    Args:
        model: A built `keras.Model`, some of whose weights are in parts.
    """
    chosen = [
        layer
        for layer in model._flatten_layers()
        if frees_weights(layer)
        and not isinstance(vars(layer).get("call"), _RecomputedCall | ParallelCall)
    ]
    for layer in chosen:
        for name in _NAMES:
            vars(layer)[name] = _RegatheringCall(layer, getattr(layer, name))
    try:
        yield
    finally:
        for layer in chosen:
            for name in _NAMES:
                if isinstance(vars(layer).get(name), _RegatheringCall):
                    del vars(layer)[name]


def _is_trained(leaves: Sequence[Any]) -> bool:
    """Tells whether a call is part of the graph of a gradient."""
    if tf.executing_eagerly() or not _record.could_possibly_record():
        return False
    if _global_state.get_global_attribute("symbolic_scope") is not None:
        return False  # only shapes are computed
    if isinstance(_global_state.get_global_attribute("stateless_scope"), StepScope):
        return False  # the weights are on servers
    return not any(isinstance(leaf, keras.KerasTensor) for leaf in leaves)


def _recomputed(
    layer: Any, call: Call, args: Any, kwargs: Any, weights: LayerWeights, is_optional: bool
) -> Any:
    """Calls a layer such that the backward pass calls it again."""
    arguments = _Leaves((args, kwargs))
    surroundings = CallSurroundings.now()
    graph = tf.compat.v1.get_default_graph()
    thread_ops = ops_of_thread(graph)
    wholes = weights.gathered_after(arguments.tensors)
    weights.note(wholes)
    begin = len(thread_ops)
    read = dict(zip(weights.ids, wholes, strict=True))
    with FirstPass(read) as first, _record.VariableWatcher() as watcher:
        outputs = call(*args, **kwargs)
    ops = thread_ops[begin:]
    try:
        first.refuse_changes_inside(layer)
        refuse_unrepeatable(layer, graph, ops, first.writes)
    except ArgumentError:
        if not is_optional:
            raise
        first.hand_over_losses(layer, first.losses)
        return outputs
    results = [*tf.nest.flatten(outputs, expand_composites=True), *first.losses]
    if not any(map(has_gradient, results)):
        first.hand_over_losses(layer, first.losses)
        return outputs
    # All that the results can be differentiated by, wherever the layer has it from.
    hidden = _hidden(graph, ops, [*arguments.tensors, *wholes])
    raw = first.raw_variables(watcher.watched_variables())
    second = _SecondCall(
        layer, call, arguments, surroundings, weights, first.values, hidden, raw, results
    )
    anchors = [t for t in [*arguments.tensors, *first.values.values()] if has_gradient(t)]
    anchors += [*hidden, *map(tf.identity, raw)]
    results = tied(results, anchors, second.gradient)
    count = len(results) - len(first.losses)
    first.hand_over_losses(layer, results[count:])
    return tf.nest.pack_sequence_as(outputs, results[:count], expand_composites=True)


@dataclass(frozen=True)
class _SecondCall:
    """The backward pass of a call: it calls the layer again, and differentiates that.

    Attributes:
        layer: The layer.
        call: The layer's own `call`.
        arguments: The arguments of the first call.
        surroundings: What else the first call depended on.
        weights: The layer's weights that are in parts.
        values: The values that the first call has read, by the ids of the variables. Those of
            the whole weights come first.
        hidden: Tensors that the layer uses without getting them as arguments.
        raw: The `tf.Variable`s that the layer uses.
        results: The outputs and losses of the first call.
    """

    layer: Any
    call: Call
    arguments: _Leaves
    surroundings: CallSurroundings
    weights: LayerWeights
    values: dict[int, Tensor]
    hidden: Sequence[Tensor]
    raw: Sequence[Any]
    results: Sequence[Tensor]

    def gradient(self, *upstream: Tensor) -> list[Any]:
        """Returns the gradients of arguments, values, hidden tensors and raw variables.

        Args:
            upstream: The gradients of the results that can have one.
        """
        dense = [tf.convert_to_tensor(gradient) for gradient in upstream]
        wholes = len(self.weights.ids)
        of_layer = list(self.values.values())[wholes:]
        again, later_of_layer = after(dense, self.arguments.tensors, of_layer)
        later_values = [*self.weights.gathered_after(dense), *later_of_layer]
        later = [*again, *later_values]
        with self.surroundings.restored(), tf.GradientTape() as tape:
            tape.watch([t for t in [*later, *self.hidden] if has_gradient(t)])
            scope = SecondPass(dict(zip(self.values, later_values, strict=True)))
            with scope:
                args, kwargs = self.arguments.replaced(again)
                repeated = self.call(*args, **kwargs)
        repeats = [*tf.nest.flatten(repeated, expand_composites=True), *scope.losses]
        scope.forget_losses(self.layer)
        _check_same(self.layer, self.results, repeats)
        sources = [*(t for t in later if has_gradient(t)), *self.hidden, *self.raw]
        repeats = [
            second
            for first, second in zip(self.results, repeats, strict=True)
            if has_gradient(first)
        ]
        gradients: list[Any] = tape.gradient(repeats, sources, output_gradients=dense)
        begin = sum(map(has_gradient, again))
        parts = self.weights.scattered(gradients[begin : begin + wholes])
        return [*gradients[:begin], *parts, *gradients[begin + wholes :]]


class _Leaves:
    """The arguments of a call, whose tensors can be replaced."""

    def __init__(self, arguments: Any) -> None:
        self._arguments = arguments
        self._leaves = tf.nest.flatten(arguments, expand_composites=True)
        # The call may take masks off its arguments.
        self._masks = [getattr(leaf, "_keras_mask", None) for leaf in self._leaves]

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors of the graph among the arguments."""
        return [leaf for leaf in self._leaves if tf.is_symbolic_tensor(leaf)]

    def replaced(self, tensors: Sequence[Tensor]) -> Any:
        """Returns the arguments with other tensors, which get the masks of the first ones.

        Args:
            tensors: As many as `tensors`.
        """
        remaining = iter(tensors)
        leaves = [
            next(remaining) if tf.is_symbolic_tensor(leaf) else leaf for leaf in self._leaves
        ]
        for leaf, mask in zip(leaves, self._masks, strict=True):
            if mask is not None:
                leaf._keras_mask = mask
        return tf.nest.pack_sequence_as(self._arguments, leaves, expand_composites=True)


def _hidden(graph: Any, ops: Sequence[Any], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Lists tensors that a layer uses and that are neither its arguments nor made by it."""
    inside = {output.name for op in ops if op.type != "Placeholder" for output in op.outputs}
    inside |= {tensor.name for tensor in tensors if tensor.graph is graph}
    used = [output for op in ops if op.type == "Placeholder" for output in op.outputs]
    used += [tensor for op in ops for tensor in op.inputs]
    hidden = {t.name: t for t in used if t.name not in inside and t.op.type != "Const"}
    return [tensor for tensor in hidden.values() if has_gradient(tensor)]


def _check_same(layer: Any, results: Sequence[Any], repeats: Sequence[Any]) -> None:
    same = len(results) == len(repeats) and all(
        getattr(a, "dtype", None) == getattr(b, "dtype", None)
        and getattr(a, "shape", None) == getattr(b, "shape", None)
        for a, b in zip(results, repeats, strict=True)
    )
    if not same:
        raise RuntimeError(
            "A layer whose activations are recomputed must compute the same when it is called "
            f"again. Received: layer {layer.name!r}, whose second call returned {repeats!r} "
            f"after {results!r}. Leave it out of `layers` of tfdist.recompute."
        )
