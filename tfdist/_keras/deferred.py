"""Weights that get their values, and memory for them, when they are first read.

A `keras.Variable` that is made in `deferring()` has a `Deferred` in place of its
`tf.Variable`, which is empty. Its first read or assignment puts the `tf.Variable` back. What
only needs shapes, such as the build of a functional model, reads no value.

This is right for what Keras's own initializers make from an integer seed: the value does not
depend on when it is made. All other variables have their values at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import tensorflow as tf
from keras.src.backend.tensorflow.core import Variable as _Variable

from tfdist._keras.interception import replaced
from tfdist._keras.replica import Tensor
from tfdist._keras.sharded_weights import Backing
from tfdist._keras.variables import empty, is_never_run, refill

# Variables of fewer elements have their values at once: there is nothing to save.
_FEWEST = 1024
# What `tf.Module`s and TensorFlow's savers ask of a `tf.Variable`. Other private names are only
# tried for, as `_distributed_container`, and must not give it memory.
_OF_SAVERS = frozenset(
    {
        "_copy_trackable_to_cpu",
        "_export_to_saved_model_graph",
        "_restore_from_tensors",
        "_serialize_to_tensors",
        "_shared_name",
        "_write_object_proto",
    }
)


class Deferred(Backing):
    """The backing of a `keras.Variable` that has no value yet.

    Args:
        variable: The `keras.Variable`.
        whole: Its empty `tf.Variable`.
        initializer: Makes its value.
    """

    def __init__(self, variable: Any, whole: Any, initializer: Any) -> None:
        super().__init__(variable, whole, whole.shape)
        self.whole = whole
        self.initializer = initializer

    def initial_value(self) -> Tensor:
        """Makes the value that Keras would have made."""
        return self.initializer(self.variable._shape, dtype=self.variable._dtype)

    def filled(self) -> Any:
        """Returns the `tf.Variable`, with its value. From now on it backs the variable."""
        if self.variable._value is self:
            # The value may be needed for the first time while a step is traced.
            with tf.init_scope():
                self.put(self.initial_value())
        return self.whole

    def put(self, value: Tensor) -> None:
        """Gives the variable its `tf.Variable` back, with a value.

        Args:
            value: A tensor of its shape.
        """
        refill(self.whole, [value])
        self.variable._value = self.whole

    def __tf_tensor__(self, dtype: Any = None, name: str | None = None) -> Tensor:
        source = self.whole if is_never_run() else self.filled()
        return tf.convert_to_tensor(source, dtype=dtype, name=name)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return self.filled().numpy().astype(dtype or self.dtype.as_numpy_dtype)

    def assign(self, value: Any) -> Any:
        """Writes a value; the one of the initializer is not made.

        Args:
            value: A tensor of its shape.
        """
        if not tf.executing_eagerly():
            return (self.whole if is_never_run() else self.filled()).assign(value)
        self.put(tf.convert_to_tensor(value, self.dtype))
        return self.whole

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") and name not in _OF_SAVERS:
            raise AttributeError(name)
        return getattr(self.whole if is_never_run() else self.filled(), name)


@contextlib.contextmanager
def deferring() -> Iterator[None]:
    """Makes a context in which variables are made without values.

    Relies on `Variable._initialize_with_initializer`, which Keras calls with an initializer.
    """
    initialize = _Variable._initialize_with_initializer

    def initialize_later(variable: Any, initializer: Any) -> None:
        if not _may_wait(variable, initializer):
            initialize(variable, initializer)
            return
        variable._initialize(lambda: tf.zeros(variable._shape, variable._dtype))
        empty(variable._value)
        variable._value = Deferred(variable, variable._value, initializer)

    with replaced(_Variable, "_initialize_with_initializer", initialize_later):
        yield


def _may_wait(variable: Any, initializer: Any) -> bool:
    of_keras = type(initializer).__module__.startswith("keras.src.initializers.")
    is_fixed = isinstance(getattr(initializer, "seed", None), int | None)
    size = tf.TensorShape(variable._shape).num_elements()
    is_plain = tf.executing_eagerly() and not tf.distribute.has_strategy()
    return of_keras and is_fixed and is_plain and size >= _FEWEST


def deferred(variable: Any) -> Deferred | None:
    """Returns the backing of a variable that has no value yet, or None.

    Args:
        variable: A `keras.Variable`.
    """
    return variable._value if isinstance(variable._value, Deferred) else None
