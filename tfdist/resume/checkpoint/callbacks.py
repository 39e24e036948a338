"""The state of callbacks: the attributes that training changes are saved and restored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np

from tfdist.errors import ArgumentError, CheckpointError
from tfdist.resume.checkpoint.callback_attributes import is_state
from tfdist.resume.checkpoint.plain import NotPlain, decode, encode

_WITHOUT_STATE = (keras.callbacks.ProgbarLogger,)
_Attributes = dict[str, tuple[Any, list[Any]]]


class CallbackState:
    """The state of a list of callbacks.

    An attribute is state if it is plain data and training has changed it, compared to its
    value before or after `on_train_begin`. So a setting that you change before you continue a
    training, such as another patience, keeps its new value.

    Args:
        callbacks: The callbacks, before `on_train_begin`.
    """

    def __init__(self, callbacks: Sequence[Any]) -> None:
        self._named = list(_named(callbacks))
        self._before_begin = {name: _attributes(callback) for name, callback in self._named}
        self._after_begin = self._before_begin

    def note_begun(self) -> None:
        """Notes the attributes after `on_train_begin`."""
        self._after_begin = {name: _attributes(callback) for name, callback in self._named}

    def state(self, arrays: list[Any]) -> dict[str, Any]:
        """Returns the state of all callbacks, for JSON.

        Args:
            arrays: A list to which the arrays of the state are appended.
        """
        states: dict[str, Any] = {}
        for name, callback in self._named:
            checkpoint_state = getattr(callback, "checkpoint_state", None)
            if checkpoint_state is not None:
                states[name] = {"own": _encode(callback, checkpoint_state(), arrays)}
                continue
            first, after_begin = self._before_begin[name], self._after_begin[name]
            changes = {
                attribute: value
                for attribute, value in _attributes(callback).items()
                if not (
                    _equal(value, first.get(attribute))
                    and _equal(value, after_begin.get(attribute))
                )
            }
            states[name] = {
                attribute: encode(vars(callback)[attribute], arrays) for attribute in changes
            }
        return states

    def restore(self, state: dict[str, Any], arrays: Callable[[int], Any]) -> None:
        """Restores the state of callbacks. A callback without saved state is not changed.

        Args:
            state: The result of `state`.
            arrays: Returns an array by its index.

        Raises:
            CheckpointError: The state is not as `state` returns it.
        """
        try:
            self._restore(state, arrays)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise CheckpointError(
                "The state of callbacks in a checkpoint must be as tfdist writes it. Received: "
                f"{type(error).__name__}: {error}. Continue from another checkpoint."
            ) from error

    def _restore(self, state: dict[str, Any], arrays: Callable[[int], Any]) -> None:
        state = {_stable(name): encoded for name, encoded in state.items()}
        for name, callback in self._named:
            encoded = state.get(name, {})
            if hasattr(callback, "restore_checkpoint_state"):
                if "own" in encoded:
                    callback.restore_checkpoint_state(decode(encoded["own"], arrays))
                continue
            for attribute, value in encoded.items():
                restored = decode(value, arrays)
                if not is_state(callback, attribute, restored):
                    continue
                current = getattr(callback, attribute, None)
                if isinstance(current, dict) and type(current) is not dict:
                    current.clear()  # keeps its class, such as defaultdict
                    current.update(restored)
                else:
                    setattr(callback, attribute, restored)


def _encode(callback: Any, state: Any, arrays: list[Any]) -> Any:
    try:
        return encode(state, arrays)
    except NotPlain:
        raise ArgumentError(
            "`checkpoint_state` of a callback must give numbers, text, arrays, and lists, "
            f"tuples, sets and dicts of them. Received: {state!r} from "
            f"{type(callback).__name__}."
        ) from None


def _named(callbacks: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Names each callback by its class, and by its number among those of the class.

    The chief has additional callbacks, but their classes are on no other worker. So the names
    are the same on all workers.
    """
    counts: Counter[str] = Counter()
    for callback in callbacks:
        if not isinstance(callback, _WITHOUT_STATE):
            kind = _stable(f"{type(callback).__module__}.{type(callback).__qualname__}")
            counts[kind] += 1
            yield f"{kind} {counts[kind]}", callback


def _stable(name: str) -> str:
    """Removes the module from the name of a class of Keras or tfdist: releases move them."""
    package, _, rest = name.partition(".")
    return f"{package}.{rest.rpartition('.')[2]}" if package in ("keras", "tfdist") else name


def _attributes(callback: Any) -> _Attributes:
    attributes: _Attributes = {}
    for attribute, value in vars(callback).items():
        arrays: list[Any] = []
        if is_state(callback, attribute, value):
            try:
                attributes[attribute] = (encode(value, arrays), arrays)
            except NotPlain:
                continue
    return attributes


def _equal(first: Any, second: Any) -> bool:
    if (
        first is None
        or second is None
        or first[0] != second[0]
        or len(first[1]) != len(second[1])
    ):
        return False
    pairs = zip(first[1], second[1], strict=True)
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)
