"""Traces that may fail, and leave TensorFlow as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf


@contextlib.contextmanager
def keeping_variable_scope() -> Iterator[None]:
    """Leaves TensorFlow's variable scope as it is, also where a trace fails.

    A loop of TensorFlow sets the scope's device for caches while it is traced. If the trace
    fails the device stays set, and the next `MirroredStrategy().scope()` is refused.

    Relies on `VariableScope._caching_device`.
    """
    scope = tf.compat.v1.get_variable_scope()
    before = scope._caching_device
    try:
        yield
    finally:
        scope._caching_device = before


def map_fn(function: Callable[..., Any], elements: Any, **options: Any) -> Any:
    """Applies a function to one row after the other, as `tf.map_fn`; it may raise.

    Args:
        function: Of a row.
        elements: Tensors of the same number of rows.
        **options: Of `tf.map_fn`.
    """
    with keeping_variable_scope():
        return tf.map_fn(function, elements, **options)
