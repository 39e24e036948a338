"""Optimizer updates of variables on parameter servers."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfdist._keras.parts import FixedValue, Split, VariableRows, parts_of
from tfdist._keras.replica import Tensor

# These update each element from its own gradient and state only, so rows are independent.
_ELEMENTWISE = tuple(
    getattr(keras.optimizers, name)
    for name in ("SGD", "RMSprop", "Adam", "AdamW", "Adadelta", "Adagrad", "Adamax", "Nadam",
                 "Ftrl", "Lion")
)  # fmt: skip


def trained_by(optimizer: Any) -> list[tuple[Any, list[Any]]]:
    """Lists the variables that an optimizer trains, each with its slots.

    A Keras optimizer has lists of slots, with one slot for each trainable variable. Of a
    LossScaleOptimizer, the wrapped optimizer is used.

    Args:
        optimizer: A built `keras.Optimizer`.

    Returns:
        Pairs of a variable and its slots.
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
        (variable, [slots[i] for slots in lists if isinstance(slots[i], keras.Variable)])
        for i, variable in enumerate(trained)
    ]


def is_elementwise(optimizer: Any) -> bool:
    """Returns whether an optimizer updates each element independently.

    Args:
        optimizer: A `keras.Optimizer`.
    """
    return type(getattr(optimizer, "inner_optimizer", optimizer)) in _ELEMENTWISE


def register_parts(optimizer: Any) -> None:
    """Adds the parts of split variables to an optimizer's index of variables.

    Args:
        optimizer: A built `keras.Optimizer`, reindexed.
    """
    for each in (optimizer, getattr(optimizer, "inner_optimizer", None)):
        if each is not None and each.built:
            for index, variable in enumerate(each._trainable_variables):
                for part in parts_of(variable):
                    each._trainable_variables_indices[part._unique_id] = index


def _on_server(device: str, updates: Sequence[Callable[[], None]]) -> None:
    """Makes all updates of a server in one function call.

    Later ops then depend on a single op of that server. Otherwise TensorFlow would notify the
    other servers of every single assignment.
    """

    def update_all() -> None:
        for update in updates:
            update()

    if tf.executing_eagerly():  # an eager function cannot take a tensor of another server
        update_all()
        return
    with tf.device(device):
        tf.function(update_all, autograph=False)()


def _updates_of_parts(
    optimizer: Any,
    gradient: Tensor,
    variable: Any,
    slots: Sequence[Any],
    copies: _ServerCopies,
    by_rows: bool,
) -> list[tuple[str, Callable[[], None]]]:
    value = variable._value
    gradients = value.cut(gradient) if isinstance(value, Split) else [gradient]
    slots_parts = [parts_of(slot) for slot in slots]
    updates: list[tuple[str, Callable[[], None]]] = []
    for i, (part, rows) in enumerate(zip(parts_of(variable), gradients, strict=True)):
        backings = [(variable, part)]
        backings += [(s, parts[i]) for s, parts in zip(slots, slots_parts, strict=True)]
        rate_and_count = copies.on(part.device)
        update = functools.partial(
            _update, optimizer, rows, variable, backings, rate_and_count, by_rows, part.device
        )
        updates.append((part.device, update))
    return updates


def _update(
    optimizer: Any,
    gradient: Tensor,
    variable: Any,
    backings: Sequence[tuple[Any, Any]],
    rate_and_count: tuple[Tensor, FixedValue],
    by_rows: bool,
    device: str,
) -> None:
    learning_rate, iterations = rate_and_count
    with tf.device(device):
        if isinstance(gradient, tf.IndexedSlices) and by_rows:
            ids, gradient = _summed_by_row(gradient)
            backings = [(v, VariableRows(backing, ids)) for v, backing in backings]
        # `update_step` reads and assigns `keras.Variable`s. So each of them is backed by its
        # part on this server meanwhile.
        with _backed_by([*backings, (optimizer._iterations, iterations)]):
            optimizer.update_step(gradient, variable, learning_rate)


class _ServerCopies:
    """Copies of the learning rate and the step counter, one for each server."""

    def __init__(self, optimizer: Any, learning_rate: Any) -> None:
        # With gradient accumulation, `iterations` counts updates and `_iterations` steps.
        values = [tf.convert_to_tensor(v) for v in (learning_rate, optimizer._iterations)]
        self._dtypes = [tensor.dtype for tensor in values]
        # Together, so that each server gets one message. float64 holds both exactly.
        self._packed = tf.stack([tf.cast(tensor, tf.float64) for tensor in values])
        self._copies: dict[str, tuple[Tensor, FixedValue]] = {}

    def on(self, device: str) -> tuple[Tensor, FixedValue]:
        """Returns both on a server.

        Args:
            device: The server's device.
        """
        if device not in self._copies:
            with tf.device(device):
                parts = tf.unstack(tf.identity(self._packed))
                rate, count = (tf.cast(p, d) for p, d in zip(parts, self._dtypes, strict=True))
                self._copies[device] = (rate, FixedValue(count))
        return self._copies[device]


def _summed_by_row(slices: Tensor) -> tuple[Tensor, Tensor]:
    ids, segments = tf.unique(slices.indices)
    return ids, tf.math.unsorted_segment_sum(slices.values, segments, tf.size(ids))


@contextlib.contextmanager
def _backed_by(backings: Sequence[tuple[Any, Any]]) -> Iterator[None]:
    before = [variable._value for variable, _ in backings]
    for variable, backing in backings:
        variable._value = backing
    try:
        yield
    finally:
        for (variable, _), value in zip(backings, before, strict=True):
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
