"""Moves a model's variables to the servers for training, and back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from tfdist import _keras
from tfdist._keras import served_updates
from tfdist._keras.parts import Split
from tfdist.strategies.parameter_server.placement import Size, VariableSlice, place


def plan(
    variables: Sequence[Any], optimizers: Sequence[Any], servers: int, min_part_bytes: int
) -> list[tuple[Any, tuple[VariableSlice, ...], list[Any]]]:
    """Chooses the servers of each variable.

    Args:
        variables: A model's `keras.Variable`s, with those of its optimizers.
        optimizers: The optimizers.
        servers: Number of servers.
        min_part_bytes: Smallest number of bytes of a part of a split variable.

    Returns:
        Triples of a variable, its parts, and its slots. The slots, an optimizer's state for
        the variable, have the same parts. Scalars are on the first server.
    """
    groups: list[tuple[Any, list[Any], bool]] = []
    grouped_ids: set[int] = set()
    for optimizer in optimizers:
        if not optimizer.built:
            continue
        # An optimizer that combines the elements of a variable, for example by a norm, needs
        # all rows on one server.
        can_split = served_updates.is_elementwise(optimizer)
        for variable, slots in served_updates.trained_by(optimizer):
            if id(variable) in grouped_ids:  # two optimizers train it: it has its place already
                continue
            same_shape = [slot for slot in slots if slot.shape == variable.shape]
            grouped_ids.update(id(v) for v in (variable, *same_shape))
            groups.append((variable, same_shape, can_split and bool(variable.shape.rank)))
    ungrouped = [v for v in variables if id(v) not in grouped_ids]
    groups += [(v, [], False) for v in ungrouped if v.shape.rank]
    sizes = [
        Size(
            int(variable.shape[0]) if variable.shape.rank else 1,
            _keras.num_bytes(variable) * (1 + len(slots)),
            can_split,
        )
        for variable, slots, can_split in groups
    ]
    parts = place(sizes, servers, min_part_bytes)
    placed = [(v, p, slots) for (v, slots, _), p in zip(groups, parts, strict=True)]
    first = (VariableSlice(0, 0, 1),)
    return [*placed, *((v, first, []) for v in ungrouped if not v.shape.rank)]


class ServerVariables(contextlib.AbstractContextManager[None]):
    """Moves variables to the servers, and back.

    Inside the context, the backing variable of a `keras.Variable` is on one or several
    servers. `MirroredVariables` does the same for devices of one process.

    Args:
        placed: The result of `plan`.
        optimizers: The optimizers that own some of the variables.
        servers: The servers' devices.
        replacements: Makes the context in which Keras's layers read variables from servers.
    """

    def __init__(
        self,
        placed: Sequence[tuple[Any, tuple[VariableSlice, ...], list[Any]]],
        optimizers: Sequence[Any],
        servers: Sequence[str],
        replacements: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        self._parts_of = [
            (each, parts) for variable, parts, slots in placed for each in (variable, *slots)
        ]
        self._optimizers = optimizers
        self._servers = servers
        self._replacements = replacements
        self._stack = contextlib.ExitStack()
        # The backing variables not in use now: those on servers outside of the context, the
        # plain ones inside.
        self._unused: list[Any] = []

    def __enter__(self) -> None:
        if self._unused:
            for (variable, _), on_server in zip(self._parts_of, self._unused, strict=True):
                on_server.assign(tf.convert_to_tensor(variable.value))
        else:
            self._unused = [self._make(variable, parts) for variable, parts in self._parts_of]
        self._swap()
        for optimizer in self._optimizers:
            served_updates.register_parts(optimizer)
        self._stack.enter_context(self._replacements())

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._swap()
        for (variable, _), on_server in zip(self._parts_of, self._unused, strict=True):
            variable.assign(on_server.numpy())

    def _swap(self) -> None:
        self._unused = [
            _keras.swap_value(variable, other)
            for (variable, _), other in zip(self._parts_of, self._unused, strict=True)
        ]
        for optimizer in self._optimizers:
            _keras.reindex_optimizer(optimizer)

    def _make(self, variable: Any, parts: Sequence[VariableSlice]) -> Any:
        value = variable.numpy()
        backing = []
        for part in parts:
            with tf.device(self._servers[part.server]):
                rows = value if len(parts) == 1 else value[part.begin : part.end]
                backing.append(
                    tf.Variable(
                        rows,
                        dtype=variable.dtype,
                        trainable=variable.trainable,
                        name=variable.name,
                    )
                )
        return backing[0] if len(backing) == 1 else Split(backing)
