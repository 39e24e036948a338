"""How optimizers update variables that are on parameter servers."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfdist._keras.parts import Known, Rows, Split, parts_of
from tfdist._keras.replica import Tensor

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
