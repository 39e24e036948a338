"""A model's variables on the servers while it trains, and back."""

from __future__ import annotations

import contextlib
import math
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
    """Decides where each variable goes.

    Args:
        variables: A model's `keras.Variable`s, its optimizers' among them.
        optimizers: The optimizers.
        servers: How many there are.
        min_part_bytes: Of a part of a split variable.

    Returns:
        Variables with their parts and with those that go where they go, an optimizer's
        state for them. Single numbers and what is left is on the first server.
    """
    groups: list[tuple[Any, list[Any], bool]] = []
    seen: set[int] = set()
    for optimizer in optimizers:
        if not optimizer.built:
            continue
        can_split = served_updates.is_elementwise(optimizer)
        for variable, slots in served_updates.trained_by(optimizer):
            if id(variable) in seen:  # a second optimizer's state is placed like the first's
                continue
            same = [slot for slot in slots if slot.shape == variable.shape]
            seen.update(id(v) for v in (variable, *same))
            groups.append((variable, same, can_split and bool(variable.shape.rank)))
    rest = [v for v in variables if id(v) not in seen]
    groups += [(v, [], False) for v in rest if v.shape.rank]
    sizes = [
        Size(
            int(variable.shape[0]) if variable.shape.rank else 1,
            num_bytes(variable) * (1 + len(slots)),
            can_split,
        )
        for variable, slots, can_split in groups
    ]
    parts = place(sizes, servers, min_part_bytes)
    placed = [(v, p, slots) for (v, slots, _), p in zip(groups, parts, strict=True)]
    first = (VariableSlice(0, 0, 1),)
    return [*placed, *((v, first, []) for v in rest if not v.shape.rank)]


def num_bytes(variable: Any) -> int:
    """Counts the bytes of a `keras.Variable`."""
    return math.prod(map(int, variable.shape)) * int(tf.as_dtype(variable.dtype).size)


class ServerVariables(contextlib.AbstractContextManager[None]):
    """Moves variables to the servers, and back.

    While inside, a `keras.Variable` lives on the server that has it, or on several; see
    `MirroredVariables`, which does so for devices of one process.

    Args:
        placed: What `plan` returned.
        optimizers: The optimizers among whose variables they are.
        servers: Their devices.
        replacements: Makes the context in which Keras knows where variables are.
    """

    def __init__(
        self,
        placed: Sequence[tuple[Any, tuple[VariableSlice, ...], list[Any]]],
        optimizers: Sequence[Any],
        servers: Sequence[str],
        replacements: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        self._homes = [
            (each, parts) for variable, parts, slots in placed for each in (variable, *slots)
        ]
        self._optimizers = optimizers
        self._servers = servers
        self._replacements = replacements
        self._stack = contextlib.ExitStack()
        self._elsewhere: list[Any] = []  # the copies that are not in use

    def __enter__(self) -> None:
        if self._elsewhere:
            for (variable, _), there in zip(self._homes, self._elsewhere, strict=True):
                there.assign(tf.convert_to_tensor(variable.value))
        else:
            self._elsewhere = [self._make(variable, parts) for variable, parts in self._homes]
        self._swap()
        for optimizer in self._optimizers:
            served_updates.register_parts(optimizer)
        self._stack.enter_context(self._replacements())

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._swap()
        for (variable, _), there in zip(self._homes, self._elsewhere, strict=True):
            variable.assign(there.numpy())

    def _swap(self) -> None:
        self._elsewhere = [
            _keras.swap_value(variable, other)
            for (variable, _), other in zip(self._homes, self._elsewhere, strict=True)
        ]
        for optimizer in self._optimizers:
            _keras.reindex_optimizer(optimizer)

    def _make(self, variable: Any, parts: Sequence[VariableSlice]) -> Any:
        value = variable.numpy()
        made = []
        for part in parts:
            with tf.device(self._servers[part.server]):
                rows = value if len(parts) == 1 else value[part.begin : part.end]
                made.append(
                    tf.Variable(
                        rows,
                        dtype=variable.dtype,
                        trainable=variable.trainable,
                        name=variable.name,
                    )
                )
        return made[0] if len(made) == 1 else Split(made)
