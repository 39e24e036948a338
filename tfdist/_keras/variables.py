"""The backing variables of `keras.Variable`s, and a record of assignments."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf
from keras.src.backend.common.variables import Variable as _AnyVariable
from keras.src.backend.tensorflow.core import Variable as _Variable

from tfdist._keras.reads import note_read
from tfdist._keras.replica import Tensor, current_batch

_keras_direct_assign = _Variable._direct_assign
_keras_value = _AnyVariable.value.fget
# Keras's graphs for shapes, and those of `discovery` and `step_graph`.
_NEVER_RUN = ("scratch_graph", "discovery", "memory")
_FIRST = "_tfdist_first_backing"  # an attribute of a `keras.Variable`


@dataclass(frozen=True)
class FirstBacking:
    """By what Keras's optimizers knew a variable before its backing was replaced.

    Attributes:
        name: The name of the `tf.Variable`.
        _unique_id: Its key, where Keras looks for it.
    """

    name: str
    _unique_id: str | None


def direct_assign(variable: Any, value: Tensor) -> None:
    batch = current_batch()
    if batch is not None:
        batch.touch(variable)
    _keras_direct_assign(variable, value)


def read_value(variable: Any) -> Tensor:
    note_read(variable)
    return _keras_value(variable)


def as_python(kind: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Makes `int` or `float` work for a mirrored variable, for which Keras's version fails.

    Args:
        kind: `int` or `float`.
    """

    def number(variable: Any) -> Any:
        value = variable._value
        has_copies = isinstance(value, tf.distribute.DistributedValues)
        return kind(value.numpy() if has_copies and not value.shape.rank else variable.value)

    return number


def num_bytes(variable: Any) -> int:
    """Counts the bytes of a variable.

    Args:
        variable: A built `keras.Variable`.
    """
    return math.prod(map(int, variable.shape)) * int(tf.as_dtype(variable.dtype).size)


def backing_variable(variable: Any) -> Any:
    """Returns the backing `tf.Variable` of a `keras.Variable`.

    Args:
        variable: The `keras.Variable`.
    """
    return variable._value


def swap_value(variable: Any, value: Any) -> Any:
    """Replaces the backing `tf.Variable` of a `keras.Variable`.

    Args:
        variable: The `keras.Variable`.
        value: A `tf.Variable` of its shape and dtype.

    Returns:
        The former backing `tf.Variable`.
    """
    before = variable._value
    # Only of the first backing variable: Keras never knew the later ones.
    if not hasattr(variable, _FIRST):
        name, key = getattr(before, "name", variable.name), getattr(before, "_unique_id", None)
        setattr(variable, _FIRST, FirstBacking(name, key))
    variable._value = value
    return before


def first_backing(variable: Any) -> FirstBacking:
    """Returns by what Keras knew a variable before `swap_value`.

    Args:
        variable: A `keras.Variable`.
    """
    first: FirstBacking | None = getattr(variable, _FIRST, None)
    if first is not None:
        return first
    value = variable._value
    return FirstBacking(value.name, value._unique_id)


def exchange_value(variable: Any, value: Any, shape: tuple[int, ...]) -> Any:
    """Replaces the backing `tf.Variable` of a `keras.Variable` by one of another shape.

    Args:
        variable: The `keras.Variable`.
        value: A `tf.Variable` of its dtype.
        shape: The shape of `value`.

    Returns:
        The former backing `tf.Variable`.
    """
    # Keras compares the shape of each assigned value with these.
    variable._shape = tuple(shape)
    variable._ndim = len(shape)
    return swap_value(variable, value)


def is_never_run() -> bool:
    """Tells whether what is traced now is traced for its shapes or variables alone."""
    graph: Any = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
    while graph is not None:
        if getattr(graph, "name", "").startswith(_NEVER_RUN):
            return True
        graph = getattr(graph, "outer_graph", None)
    return False


def empty(value: Any) -> None:
    """Frees the memory of a `tf.Variable`, or of all its copies. It must not be read then.

    Functions that were traced with it stay valid: `refill` gives it a value again.

    Args:
        value: A `tf.Variable`, mirrored or not.
    """
    # An empty value frees the memory of the former one. The handle, which traced functions have
    # captured, stays the same.
    for local in local_copies(value):
        with tf.device(local.device):
            _replace(local, tf.zeros([0], local.dtype))


def refill(value: Any, tensors: Sequence[Any]) -> None:
    """Assigns a `tf.Variable` that may be empty.

    Args:
        value: A `tf.Variable`, mirrored or not.
        tensors: The value of each of its copies.
    """
    for local, tensor in zip(local_copies(value), tensors, strict=True):
        with tf.device(local.device):
            _replace(local, tf.convert_to_tensor(tensor, local.dtype))


def _replace(value: Any, tensor: Tensor) -> None:
    # The method of a `tf.Variable` refuses another shape than that of its present value.
    tf.raw_ops.AssignVariableOp(resource=value.handle, value=tensor, validate_shape=False)


def is_empty(variable: Any) -> bool:
    """Tells whether `empty` has freed the memory of a `keras.Variable`.

    Args:
        variable: The `keras.Variable`.
    """
    shape = tf.raw_ops.VariableShape(input=local_copies(variable._value)[0].handle)
    return bool(shape.numpy().tolist() == [0])


def local_copies(value: Any) -> Any:
    """Returns a `tf.Variable`'s copies on the devices of this process.

    Args:
        value: A `tf.Variable`, mirrored or not.
    """
    return value.values if isinstance(value, tf.distribute.DistributedValues) else (value,)
