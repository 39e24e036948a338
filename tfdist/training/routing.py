"""Redirects Keras's `fit`, `evaluate` and `predict` to tfdist's, and tracks running calls."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import keras

METHODS = ("fit", "evaluate", "predict")


class _RunningCalls(threading.local):
    """The running calls of this thread.

    Attributes:
        depth: Number of nested calls of tfdist's functions.
        overriding: The running methods that override Keras's, as pairs of model and name.
    """

    def __init__(self) -> None:
        self.depth = 0
        self.overriding: list[tuple[Any, str]] = []


_calls = _RunningCalls()
_drop_ins = 0


def is_running() -> bool:
    """Returns whether one of tfdist's functions runs in this thread, so this is a callback."""
    return _calls.depth > 0


def is_drop_in() -> bool:
    """Returns whether the methods of all models are redirected to tfdist's."""
    return _drop_ins > 0


def note_drop_in(change: int) -> None:
    """Counts the calls of `drop_in` that are active.

    Args:
        change: 1 or -1.
    """
    global _drop_ins
    _drop_ins += change


@contextlib.contextmanager
def running() -> Iterator[None]:
    """Makes a context in which one of tfdist's functions runs."""
    _calls.depth += 1
    try:
        yield
    finally:
        _calls.depth -= 1


def own_method(model: Any, name: str) -> Callable[..., Any] | None:
    """Returns the method by which a model's class overrides Keras's.

    Args:
        model: The value that the user passed as the model.
        name: The method's name.

    Returns:
        The bound method. None if the class does not override it, or if it runs now.
    """
    if not isinstance(model, keras.Model) or (model, name) in _calls.overriding:
        return None
    if getattr(type(model), name) is getattr(keras.Model, name):
        return None
    method: Callable[..., Any] = getattr(model, name)
    return method


@contextlib.contextmanager
def redirected(model: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Makes a context in which Keras's method of a model calls another function.

    Args:
        model: A `keras.Model`.
        name: The method's name.
        function: Called with the model and the method's arguments.
    """
    original = getattr(keras.Model, name)

    def method(called: Any, *args: Any, **kwargs: Any) -> Any:
        is_redirected = called is model and (model, name) in _calls.overriding
        return (function if is_redirected else original)(called, *args, **kwargs)

    _calls.overriding.append((model, name))
    try:
        with replacing({name: method}):
            yield
    finally:
        _calls.overriding.pop()


class replacing(contextlib.AbstractContextManager[None]):  # noqa: N801, used as a function
    """Replaces methods of `keras.Model` at once. Its exit, or `undo`, restores them.

    Args:
        methods: The new methods by name.
    """

    def __init__(self, methods: dict[str, Any]) -> None:
        self._originals = {name: vars(keras.Model).get(name) for name in methods}
        for name, method in methods.items():
            setattr(keras.Model, name, method)

    def undo(self) -> None:
        """Restores the methods. A second call has no effect."""
        for name, method in self._originals.items():
            if method is None:
                delattr(keras.Model, name)
            else:
                setattr(keras.Model, name, method)
        self._originals = {}

    def __exit__(self, *_: object) -> None:
        self.undo()
