"""Restores TensorFlow's state after a trace that fails."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf


@contextlib.contextmanager
def keeping_variable_scope() -> Iterator[None]:
    """Restores TensorFlow's variable scope at the end, even if a trace fails.

    While a TensorFlow loop is traced, it sets the caching device of the scope. If the trace
    fails, the device remains set, and the next `MirroredStrategy().scope()` raises.

    Relies on `VariableScope._caching_device`.
    """
    scope = tf.compat.v1.get_variable_scope()
    before = scope._caching_device
    try:
        yield
    finally:
        scope._caching_device = before


def map_fn(function: Callable[..., Any], elements: Any, **options: Any) -> Any:
    """Applies a function to each row, like `tf.map_fn`. The function may raise.

    Args:
        function: A function of a row.
        elements: Tensors with the same number of rows.
        **options: Arguments of `tf.map_fn`.
    """
    with keeping_variable_scope():
        return tf.map_fn(function, elements, **options)
