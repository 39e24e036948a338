"""Keras's `fit`, `evaluate` and `predict`, led to tfdist's, and which of them run now."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import keras

METHODS = ("fit", "evaluate", "predict")


class _Calls(threading.local):
    """What this thread is in the middle of."""

    def __init__(self) -> None:
        self.depth = 0
        self.own: list[tuple[Any, str]] = []


_calls = _Calls()
_drop_ins = 0


def is_running() -> bool:
    """Tells whether one of tfdist's functions runs in this thread, and this is a callback."""
    return _calls.depth > 0


def is_drop_in() -> bool:
    """Tells whether every model's methods are led to tfdist's."""
    return _drop_ins > 0


def note_drop_in(change: int) -> None:
    """Notes that `drop_in` was called, or undone.

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
    """Gives the method with which a model's class prepares its data and calls Keras's.

    Args:
        model: What a user passed as a model.
        name: Of the method.

    Returns:
        The bound method; None if it is Keras's, or is being called.
    """
    if not isinstance(model, keras.Model) or (model, name) in _calls.own:
        return None
    if getattr(type(model), name) is getattr(keras.Model, name):
        return None
    method: Callable[..., Any] = getattr(model, name)
    return method


@contextlib.contextmanager
def led(model: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Makes a context in which Keras's method of a model is another function.

    Args:
        model: A `keras.Model`.
        name: Of the method.
        function: Called with the model and the method's arguments.
    """
    original = getattr(keras.Model, name)

    def method(called: Any, *args: Any, **kwargs: Any) -> Any:
        is_meant = called is model and (model, name) in _calls.own
        return (function if is_meant else original)(called, *args, **kwargs)

    _calls.own.append((model, name))
    try:
        with replacing({name: method}):
            yield
    finally:
        _calls.own.pop()


class replacing(contextlib.AbstractContextManager[None]):  # noqa: N801, used as a function
    """Replaces methods of `keras.Model`, at once; leaving it, or `undo`, puts them back.

    Args:
        methods: By name.
    """

    def __init__(self, methods: dict[str, Any]) -> None:
        self._before = {name: vars(keras.Model).get(name) for name in methods}
        for name, method in methods.items():
            setattr(keras.Model, name, method)

    def undo(self) -> None:
        """Puts back what was there; doing so twice does no harm."""
        for name, method in self._before.items():
            if method is None:
                delattr(keras.Model, name)
            else:
                setattr(keras.Model, name, method)
        self._before = {}

    def __exit__(self, *_: object) -> None:
        self.undo()
