"""Replacements in Keras while a model's variables are on parameter servers.

========================  ==========================================================
place                     what changes
========================  ==========================================================
the optimizer's update    each variable, or part of a split variable, is updated on
                          its own server; with `rows_only`, only the rows that have a
                          gradient
`GradientTape`            a split variable has one gradient, joined from those of its
                          parts; weights that a worker has read already are watched
`Embedding.call`          reads only the rows that it needs, on the table's server
========================  ==========================================================

(The `Embedding` of Keras 2 and TensorFlow's `ShardedVariable` did the same.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.common import global_state as _global_state
from keras.src.backend.tensorflow.optimizer import TFOptimizer as _TFOptimizer

from tfdist._keras.interception import replaced
from tfdist._keras.parts import Split
from tfdist._keras.served_updates import (
    _apply_weight_decay,
    _on_server,
    _ServerCopies,
    _updates_of_parts,
    is_elementwise,
    trained_by,
)

Tensor = Any


@contextlib.contextmanager
def served(rows_only: bool) -> Iterator[None]:
    """Replaces the places named at the top of this file.

    Args:
        rows_only: Whether an optimizer with independent elements updates only the rows that
            have a gradient, each by the sum of its gradients. Keras's own update also changes
            all other rows that have a moment, and applies several gradients of a row one by
            one.
    """
    with contextlib.ExitStack() as stack:
        for owner, name, value in replacements(rows_only):
            stack.enter_context(replaced(owner, name, value))
        yield


def replacements(rows_only: bool) -> list[tuple[Any, str, Callable[..., Any]]]:
    """Lists the replacements; see `served`."""

    def update_step(
        optimizer: Any, grads: Sequence[Tensor], trainable_variables: Any, learning_rate: Any
    ) -> None:
        by_rows = rows_only and is_elementwise(optimizer)
        slots = {id(variable): slots for variable, slots in trained_by(optimizer)}
        copies = _ServerCopies(optimizer, learning_rate)
        by_server: dict[str, list[Callable[[], None]]] = {}
        for gradient, variable in zip(grads, trainable_variables, strict=True):
            updates_of_parts = _updates_of_parts(
                optimizer, gradient, variable, slots[id(variable)], copies, by_rows
            )
            for device, update in updates_of_parts:
                by_server.setdefault(device, []).append(update)
        for device, updates in by_server.items():
            _on_server(device, updates)

    return [
        (_TFOptimizer, "_backend_update_step", update_step),
        (_TFOptimizer, "_apply_weight_decay", _apply_weight_decay),
        (tf.GradientTape, "__enter__", _enter),
        (tf.GradientTape, "gradient", _gradient),
        (keras.layers.Embedding, "call", _embed),
    ]


_tensorflow_gradient = tf.GradientTape.gradient


def _weights_read() -> dict[int, Tensor]:
    scope = _global_state.get_global_attribute("stateless_scope")
    return scope.weights if isinstance(scope, StepScope) else {}


_tensorflow_enter = tf.GradientTape.__enter__


def _enter(tape: Any) -> Any:
    entered = _tensorflow_enter(tape)
    for weight in _weights_read().values():
        tape.watch(weight)
    return entered


def _gradient(tape: Any, target: Any, sources: Any, *args: Any, **options: Any) -> Any:
    # The loss depends on the tensor that a weight was read into, not on its variable.
    weights = _weights_read()
    flat = [weights.get(id(source), source) for source in tf.nest.flatten(sources)]
    splits = [getattr(source, "_value", None) for source in flat]
    # TensorFlow knows the parts of a split variable, not the whole.
    nested = [v.parts if isinstance(v, Split) else s for s, v in zip(flat, splits, strict=True)]
    gradients = _tensorflow_gradient(tape, target, nested, *args, **options)
    joined = [
        v.join(gradient) if isinstance(v, Split) else gradient
        for gradient, v in zip(gradients, splits, strict=True)
    ]
    return tf.nest.pack_sequence_as(sources, joined)


_keras_embed = keras.layers.Embedding.call


def _embed(layer: Any, inputs: Tensor) -> Tensor:
    table = layer.__dict__.get("_embeddings")
    value = getattr(table, "_value", None)
    is_plain = not layer.lora_enabled and getattr(layer, "quantization_mode", None) is None
    if value is None or not is_plain or isinstance(inputs, keras.KerasTensor):
        return _keras_embed(layer, inputs)
    ids = tf.convert_to_tensor(inputs)
    ids = ids if ids.dtype in (tf.int32, tf.int64) else tf.cast(ids, tf.int32)
    if isinstance(value, Split):
        rows = value.lookup(ids)
    elif isinstance(value, tf.Variable):
        rows = tf.nn.embedding_lookup(value, ids)
    else:
        return _keras_embed(layer, inputs)
    return tf.cast(rows, layer.compute_dtype)


class StepScope(keras.StatelessScope):  # type: ignore[misc]
    """A stateless scope in which only some variables have values of their own.

    All other variables keep the values of their backing variables. In Keras's own
    `StatelessScope`, every variable needs a value.

    Args:
        values: Initial values of variables.
        weights: Values of trainable variables that are read already. Tapes watch them.
    """

    def __init__(
        self,
        values: Sequence[tuple[Any, Tensor]],
        weights: Sequence[tuple[Any, Tensor]] = (),
    ) -> None:
        super().__init__([*values, *weights], collect_losses=True)
        self.weights = {id(variable): value for variable, value in weights}

    def get_current_value(self, ref: Any) -> Any:
        """Returns the value of a variable in this scope."""
        value = self.assigned(ref)
        return ref._value if value is None else value

    def assigned(self, ref: Any) -> Any:
        """Returns the initial or assigned value of a variable in this scope, or None.

        Args:
            ref: The `keras.Variable`.
        """
        return super().get_current_value(ref)


def read_packed(
    model: Any, largest: int, after: Sequence[Tensor] = ()
) -> list[tuple[Any, Tensor]]:
    """Reads a model's weights, the small weights of a server in one tensor.

    Args:
        model: A built `keras.Model`, with its variables on servers.
        largest: Number of elements above which a weight is read on its own.
        after: Tensors that must be read before the weights.

    Returns:
        Pairs of a `keras.Variable` and its value, without split variables and without
        embedding tables, which are read by rows.
    """
    # Each read from a server is a message. The small weights of a server share one.
    layers = model._flatten_layers()
    tables = {id(la.__dict__.get("_embeddings")) for la in layers if hasattr(la, "embeddings")}
    packs: dict[Any, list[Any]] = {}
    for variable in model.trainable_variables:
        value = variable._value
        if isinstance(value, tf.Variable) and id(variable) not in tables:
            # A large weight has a key of its own: to copy it into a pack would cost more than a
            # message.
            single = id(value) if value.shape.num_elements() > largest else None
            packs.setdefault((value.device, value.dtype, single), []).append(variable)
    weights = []
    for (device, *_), variables in packs.items():
        with tf.device(device), tf.control_dependencies(after):
            if len(variables) == 1:
                weights.append((variables[0], tf.identity(variables[0]._value)))
                continue
            flat = tf.concat([tf.reshape(v._value, [-1]) for v in variables], 0)
        parts = tf.split(flat, [v._value.shape.num_elements() for v in variables])
        values = [tf.reshape(p, v.shape) for p, v in zip(parts, variables, strict=True)]
        weights += list(zip(variables, values, strict=True))
    return weights


@contextlib.contextmanager
def stateful() -> Iterator[None]:
    """Suspends the `keras.StatelessScope`, so that assignments take effect."""
    scope = _global_state.get_global_attribute("stateless_scope")
    _global_state.set_global_attribute("stateless_scope", None)
    try:
        yield
    finally:
        _global_state.set_global_attribute("stateless_scope", scope)


def averaging_variables(model: Any) -> set[int]:
    """Collects the ids of BatchNormalization's moving statistics.

    Args:
        model: A `keras.Model`.
    """
    return {
        id(variable)
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization)
        for variable in layer.non_trainable_variables
    }
