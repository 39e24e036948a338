"""What is replaced in Keras while a model's variables are on parameter servers.

========================  ==========================================================
place                     what changes
========================  ==========================================================
the optimizer's update    each variable is updated on the server that holds it, a part
                          of a split variable on the part's; of a variable whose
                          gradient has rows, only these, if asked for
`GradientTape`            a split variable has a gradient: its parts' in one; weights
                          that a worker has read together are watched
`Embedding.call`          reads the rows it needs, where the table is
========================  ==========================================================

(TensorFlow's own `Embedding` of Keras 2 and its `ShardedVariable` did the same.)
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.common import global_state as _global_state
from keras.src.backend.tensorflow.optimizer import TFOptimizer as _TFOptimizer

from tfdist._keras.parts import Known, Rows, Split, parts_of
from tfdist._keras.replica import replaced

Tensor = Any

# Each element is updated by its own gradient and state alone: rows can be apart.
_ELEMENTWISE = tuple(
    getattr(keras.optimizers, name)
    for name in ("SGD", "RMSprop", "Adam", "AdamW", "Adadelta", "Adagrad", "Adamax", "Nadam",
                 "Ftrl", "Lion")
)  # fmt: skip


def trained_by(optimizer: Any) -> list[tuple[Any, list[Any]]]:
    """Lists the variables that an optimizer trains, each with what it keeps for it.

    Keras's optimizers keep lists of variables, one for each trainable variable; the
    optimizer that a LossScaleOptimizer wraps is looked at in its place.

    Args:
        optimizer: A built `keras.Optimizer`.
    """
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    trained = optimizer._trainable_variables
    lists = [
        value
        for name, value in vars(optimizer).items()
        if name not in ("_trainable_variables", "_variables")
        and isinstance(value, list)
        and len(value) == len(trained)
        and any(isinstance(item, keras.Variable) for item in value)
    ]
    return [
        (variable, [found[i] for found in lists if isinstance(found[i], keras.Variable)])
        for i, variable in enumerate(trained)
    ]


def is_elementwise(optimizer: Any) -> bool:
    """Tells whether an optimizer updates each element for itself.

    Args:
        optimizer: A `keras.Optimizer`.
    """
    return type(getattr(optimizer, "inner_optimizer", optimizer)) in _ELEMENTWISE


def register_parts(optimizer: Any) -> None:
    """Lets an optimizer find its state by a part of a split variable.

    Args:
        optimizer: A built `keras.Optimizer`, reindexed.
    """
    for one in (optimizer, getattr(optimizer, "inner_optimizer", None)):
        if one is not None and one.built:
            for index, variable in enumerate(one._trainable_variables):
                for part in parts_of(variable):
                    one._trainable_variables_indices[part._unique_id] = index


@contextlib.contextmanager
def served(rows_only: bool) -> Iterator[None]:
    """Replaces the places named at the top of this file.

    Args:
        rows_only: Whether an optimizer whose elements are independent updates only rows that
            have a gradient, each by the sum of its gradients. Keras's own update leaves no
            row alone that has a moment, and takes the gradients of a row one by one.
    """
    with contextlib.ExitStack() as stack:
        for owner, name, value in replacements(rows_only):
            stack.enter_context(replaced(owner, name, value))
        yield


def replacements(rows_only: bool) -> list[tuple[Any, str, Callable[..., Any]]]:
    """Lists the places, and what is put there; see `served`."""

    def update_step(
        optimizer: Any, grads: Sequence[Tensor], trainable_variables: Any, learning_rate: Any
    ) -> None:
        by_rows = rows_only and is_elementwise(optimizer)
        kept = {id(variable): slots for variable, slots in trained_by(optimizer)}
        copies = _Copies(optimizer, learning_rate)
        of_servers: dict[str, list[Callable[[], None]]] = {}
        for gradient, variable in zip(grads, trainable_variables, strict=True):
            found = _updates_of_parts(
                optimizer, gradient, variable, kept[id(variable)], copies, by_rows
            )
            for device, update in found:
                of_servers.setdefault(device, []).append(update)
        for device, updates in of_servers.items():
            _on_server(device, updates)

    return [
        (_TFOptimizer, "_backend_update_step", update_step),
        (_TFOptimizer, "_apply_weight_decay", _apply_weight_decay),
        (tf.GradientTape, "__enter__", _enter),
        (tf.GradientTape, "gradient", _gradient),
        (keras.layers.Embedding, "call", _embed),
    ]


def _on_server(device: str, updates: Sequence[Callable[[], None]]) -> None:
    """Makes all updates of a server in one call.

    What waits for them then waits for one thing on that server. Otherwise TensorFlow tells
    the other servers of every single assignment.
    """

    def together() -> None:
        for update in updates:
            update()

    if tf.executing_eagerly():  # a server's function cannot take a tensor of another server
        together()
        return
    with tf.device(device):
        tf.function(together, autograph=False)()


def _updates_of_parts(
    optimizer: Any,
    gradient: Tensor,
    variable: Any,
    slots: Sequence[Any],
    copies: _Copies,
    by_rows: bool,
) -> list[tuple[str, Callable[[], None]]]:
    value = variable._value
    gradients = value.cut(gradient) if isinstance(value, Split) else [gradient]
    slots_parts = [parts_of(slot) for slot in slots]
    updates: list[tuple[str, Callable[[], None]]] = []
    for i, (part, rows) in enumerate(zip(parts_of(variable), gradients, strict=True)):
        homes = [(variable, part)]
        homes += [(s, parts[i]) for s, parts in zip(slots, slots_parts, strict=True)]
        sent = copies.on(part.device)
        update = functools.partial(
            _update, optimizer, rows, variable, homes, sent, by_rows, part.device
        )
        updates.append((part.device, update))
    return updates


def _update(
    optimizer: Any,
    gradient: Tensor,
    variable: Any,
    homes: Sequence[tuple[Any, Any]],
    sent: tuple[Tensor, Known],
    by_rows: bool,
    device: str,
) -> None:
    learning_rate, iterations = sent
    with tf.device(device):
        if isinstance(gradient, tf.IndexedSlices) and by_rows:
            ids, gradient = _summed_by_row(gradient)
            homes = [(v, Rows(home, ids)) for v, home in homes]
        with _living_in([*homes, (optimizer._iterations, iterations)]):
            optimizer.update_step(gradient, variable, learning_rate)


class _Copies:
    """The learning rate and the counter, sent to each server once for all its variables."""

    def __init__(self, optimizer: Any, learning_rate: Any) -> None:
        # Not `iterations`, which counts updates when several steps make one.
        both = [tf.convert_to_tensor(v) for v in (learning_rate, optimizer._iterations)]
        self._dtypes = [tensor.dtype for tensor in both]
        self._packed = tf.stack([tf.cast(tensor, tf.float64) for tensor in both])
        self._sent: dict[str, tuple[Tensor, Known]] = {}

    def on(self, device: str) -> tuple[Tensor, Known]:
        """Gives both where a server has them.

        Args:
            device: The server's.
        """
        if device not in self._sent:
            with tf.device(device):
                parts = tf.unstack(tf.identity(self._packed))
                rate, count = (tf.cast(p, d) for p, d in zip(parts, self._dtypes, strict=True))
                self._sent[device] = (rate, Known(count))
        return self._sent[device]


def _summed_by_row(slices: Tensor) -> tuple[Tensor, Tensor]:
    ids, places = tf.unique(slices.indices)
    return ids, tf.math.unsorted_segment_sum(slices.values, places, tf.size(ids))


@contextlib.contextmanager
def _living_in(homes: Sequence[tuple[Any, Any]]) -> Iterator[None]:
    before = [variable._value for variable, _ in homes]
    for variable, home in homes:
        variable._value = home
    try:
        yield
    finally:
        for (variable, _), value in zip(homes, before, strict=True):
            variable._value = value


def _apply_weight_decay(optimizer: Any, variables: Sequence[Any]) -> None:
    if optimizer.weight_decay is None:
        return
    for variable in variables:
        if optimizer._use_weight_decay(variable):
            for part in parts_of(variable):
                with tf.device(part.device):
                    rate = tf.cast(optimizer.learning_rate, part.dtype)
                    part.assign_sub(part * tf.cast(optimizer.weight_decay, part.dtype) * rate)


_tensorflow_gradient = tf.GradientTape.gradient


def _weights_read() -> dict[int, Tensor]:
    scope = _global_state.get_global_attribute("stateless_scope")
    return scope.weights if isinstance(scope, Apart) else {}


_tensorflow_enter = tf.GradientTape.__enter__


def _enter(tape: Any) -> Any:
    entered = _tensorflow_enter(tape)
    for weight in _weights_read().values():
        tape.watch(weight)
    return entered


def _gradient(tape: Any, target: Any, sources: Any, *args: Any, **options: Any) -> Any:
    read = _weights_read()
    flat = [read.get(id(source), source) for source in tf.nest.flatten(sources)]
    splits = [getattr(source, "_value", None) for source in flat]
    nested = [v.parts if isinstance(v, Split) else s for s, v in zip(flat, splits, strict=True)]
    found = _tensorflow_gradient(tape, target, nested, *args, **options)
    joined = [
        v.join(part) if isinstance(v, Split) else part
        for part, v in zip(found, splits, strict=True)
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


class Apart(keras.StatelessScope):  # type: ignore[misc]
    """A scope in which nothing is assigned, and in which only some variables have values.

    Keras gives every variable a value when it trains in a `StatelessScope`, and asks the
    scope for those that it regularizes.

    Args:
        values: What variables begin with.
        weights: Values of trainable variables that were read already; tapes watch them.
    """

    def __init__(
        self,
        values: Sequence[tuple[Any, Tensor]],
        weights: Sequence[tuple[Any, Tensor]] = (),
    ) -> None:
        super().__init__([*values, *weights], collect_losses=True)
        self.weights = {id(variable): value for variable, value in weights}

    def get_current_value(self, ref: Any) -> Any:
        """Gives what a variable is in this scope."""
        found = self.assigned(ref)
        return ref._value if found is None else found

    def assigned(self, ref: Any) -> Any:
        """Gives what a variable began with or was assigned in this scope, or None.

        Args:
            ref: The `keras.Variable`.
        """
        return super().get_current_value(ref)


def read_together(
    model: Any, largest: int, after: Sequence[Tensor] = ()
) -> list[tuple[Any, Tensor]]:
    """Reads a model's weights, the small ones of a server in one tensor.

    Args:
        model: A built `keras.Model`, its variables on servers.
        largest: Elements above which a weight is read alone.
        after: What is read before, on any server.

    Returns:
        Pairs of a `keras.Variable` and its value; split ones, and tables that are read by
        rows, are left out.
    """
    layers = model._flatten_layers()
    tables = {id(la.__dict__.get("_embeddings")) for la in layers if hasattr(la, "embeddings")}
    packs: dict[Any, list[Any]] = {}
    for variable in model.trainable_variables:
        value = variable._value
        if isinstance(value, tf.Variable) and id(variable) not in tables:
            alone = id(value) if value.shape.num_elements() > largest else None
            packs.setdefault((value.device, value.dtype, alone), []).append(variable)
    found = []
    for (device, *_), variables in packs.items():
        with tf.device(device), tf.control_dependencies(after):
            if len(variables) == 1:
                found.append((variables[0], tf.identity(variables[0]._value)))
                continue
            flat = tf.concat([tf.reshape(v._value, [-1]) for v in variables], 0)
        parts = tf.split(flat, [v._value.shape.num_elements() for v in variables])
        values = [tf.reshape(p, v.shape) for p, v in zip(parts, variables, strict=True)]
        found += list(zip(variables, values, strict=True))
    return found


@contextlib.contextmanager
def stateful() -> Iterator[None]:
    """Lets assignments through, inside of a `keras.StatelessScope`."""
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
