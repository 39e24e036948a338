"""What callbacks remember: found by what training changes in them, put back later."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np

from tfdist.errors import ArgumentError
from tfdist.resume.checkpoint.plain import NotPlain, decode, encode

# Keras sets these anew, or they are of the process.
_NOT_STATE = ("_model", "model", "params", "validation_data")
# Changes its sign when `monitor_op`, a function, is chosen: at each process's first epoch end.
_NOT_STATE_OF_MONITORS = ("min_delta",)
_OF_THE_PROCESS = (keras.callbacks.ProgbarLogger,)
_Attributes = dict[str, tuple[Any, list[Any]]]


class Memory:
    """The state of a list of callbacks.

    An attribute is state if it is plain data and training has changed it: what it was when
    training began, or after `on_train_begin`, is compared. What a user has set differently
    when a training is started again, such as another patience, stays.

    Args:
        callbacks: Before `on_train_begin`.
    """

    def __init__(self, callbacks: Sequence[Any]) -> None:
        self._named = list(_named(callbacks))
        self._at_first = {name: _attributes(callback) for name, callback in self._named}
        self._begun = self._at_first

    def note_begun(self) -> None:
        """Notes what `on_train_begin` has made of them."""
        self._begun = {name: _attributes(callback) for name, callback in self._named}

    def state(self, arrays: list[Any]) -> dict[str, Any]:
        """Gives what they remember, as JSON knows it.

        Args:
            arrays: Gets the arrays in it.
        """
        found: dict[str, Any] = {}
        for name, callback in self._named:
            own = getattr(callback, "checkpoint_state", None)
            if own is not None:
                found[name] = {"own": _encoded(callback, own(), arrays)}
                continue
            first, begun = self._at_first[name], self._begun[name]
            changed = {
                attribute: value
                for attribute, value in _attributes(callback).items()
                if not (
                    _same(value, first.get(attribute)) and _same(value, begun.get(attribute))
                )
            }
            found[name] = {
                attribute: encode(vars(callback)[attribute], arrays) for attribute in changed
            }
        return found

    def restore(self, state: dict[str, Any], arrays: Callable[[int], Any]) -> None:
        """Puts back what they remembered; those that were not there stay as they are.

        Args:
            state: What `state` gave.
            arrays: Gives an array by its place.
        """
        state = {_stable(name): written for name, written in state.items()}
        for name, callback in self._named:
            written = state.get(name, {})
            if hasattr(callback, "restore_checkpoint_state"):
                if "own" in written:
                    callback.restore_checkpoint_state(decode(written["own"], arrays))
                continue
            for attribute, value in written.items():
                known = getattr(callback, attribute, None)
                restored = decode(value, arrays)
                if isinstance(known, dict) and type(known) is not dict:
                    known.clear()  # a defaultdict stays one
                    known.update(restored)
                else:
                    setattr(callback, attribute, restored)


def _encoded(callback: Any, state: Any, arrays: list[Any]) -> Any:
    try:
        return encode(state, arrays)
    except NotPlain:
        raise ArgumentError(
            "`checkpoint_state` of a callback must give numbers, text, arrays, and lists, "
            f"tuples, sets and dicts of them. Received: {state!r} from "
            f"{type(callback).__name__}."
        ) from None


def _named(callbacks: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Names each by its class, and its number among those of it.

    The chief has callbacks that other workers do not have, but never of a class of theirs.
    """
    seen: Counter[str] = Counter()
    for callback in callbacks:
        if not isinstance(callback, _OF_THE_PROCESS):
            kind = _stable(f"{type(callback).__module__}.{type(callback).__qualname__}")
            seen[kind] += 1
            yield f"{kind} {seen[kind]}", callback


def _stable(name: str) -> str:
    """Leaves out in which module Keras or tfdist keep a class: releases move them."""
    package, _, rest = name.partition(".")
    return f"{package}.{rest.rpartition('.')[2]}" if package in ("keras", "tfdist") else name


def _attributes(callback: Any) -> _Attributes:
    found: _Attributes = {}
    is_monitor = "monitor_op" in vars(callback)
    left_out = _NOT_STATE + (_NOT_STATE_OF_MONITORS if is_monitor else ())
    for attribute, value in vars(callback).items():
        arrays: list[Any] = []
        if attribute not in left_out:
            try:
                found[attribute] = (encode(value, arrays), arrays)
            except NotPlain:
                continue
    return found


def _same(one: Any, other: Any) -> bool:
    if one is None or other is None or one[0] != other[0] or len(one[1]) != len(other[1]):
        return False
    pairs = zip(one[1], other[1], strict=True)
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)
