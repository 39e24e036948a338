"""Whether variables were written to since a moment, without a copy of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf


class Snapshot:
    """The values of variables at a moment.

    A variable's value shares the variable's memory. As long as somebody holds the value,
    TensorFlow gives a variable that is written to other memory. So the same memory means the
    same value. Where it is not the same (a variable that was updated by rows is copied when it
    is read, and values on GPUs are copied to be looked at), the bytes are compared.

    Args:
        variables: `keras.Variable`s, outside of a `tf.function`.
    """

    def __init__(self, variables: Sequence[Any]) -> None:
        self._variables = list(variables)
        self._values = self._read()

    def changed(self) -> list[Any]:
        """Lists the variables that have other bits now."""
        values = zip(self._variables, self._values, self._read(), strict=True)
        return [variable for variable, old, new in values if not _are_same(old, new)]

    def _read(self) -> list[Any]:
        return [tf.convert_to_tensor(variable.value) for variable in self._variables]


def slots_of(optimizer: Any) -> list[Any]:
    """Lists what an optimizer keeps of gradients: not its count, nor its learning rate.

    Those that processes keep in parts are left out: they cannot be read without the others.

    Args:
        optimizer: A `keras.optimizers.Optimizer`.
    """
    settings = optimizer.iterations, getattr(optimizer, "_learning_rate", None)
    return [
        variable
        for variable in optimizer.variables
        if isinstance(variable._value, tf.Variable)
        and not any(variable is setting for setting in settings)
    ]


def _are_same(one: Any, other: Any) -> bool:
    memory, other_memory = memory_of(one), memory_of(other)
    if memory.ctypes.data == other_memory.ctypes.data:
        return True
    return bool(memory.tobytes() == other_memory.tobytes())


def memory_of(tensor: Any) -> Any:
    """Returns an array of an eager tensor, which shares its memory if that is the CPU's."""
    return np.asarray(tensor._numpy())
