"""Notices what callbacks do to the weights of a model in private training."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras

from tfdist import _keras
from tfdist.privacy.model_history import digest

_HOOKS = (
    "set_params", "set_model", "on_train_begin", "on_train_end", "on_epoch_begin",
    "on_epoch_end", "on_test_begin", "on_test_end",
)  # fmt: skip
_STEP_HOOKS = (
    "on_train_batch_begin", "on_train_batch_end", "on_test_batch_begin", "on_test_batch_end",
    "on_batch_begin", "on_batch_end",
)  # fmt: skip


class _Mark(NamedTuple):
    """The weights before a callback, and how many updates the optimizer had counted."""

    weights: _keras.Snapshot
    updates: int


class OutsideChanges:
    """Compares the weights before and after each of the user's own callbacks.

    Callbacks of Keras and tfdist are trusted: they restore or average weights of this training.
    `BackupAndRestore` is not, where it restores: a backup may be of other training, and its
    file says what is private in it. Neither is the function of a `LearningRateScheduler`.
    Weights that the training had at an earlier call of a callback are no change, since what is
    computed from released weights is private.

    Args:
        model: A compiled `keras.Model`.
        note: Called for a change, with the number of updates that the optimizer has counted.
    """

    def __init__(self, model: Any, note: Callable[[int], None]) -> None:
        self._model, self._note = model, note
        self._training_digests: set[bytes] = set()
        self._marks: list[_Mark] = []  # a callback may evaluate, which calls others

    def watched(self, callbacks: Any) -> Any:
        """Adds callbacks before and after each of the user's own ones.

        Args:
            callbacks: A list of callbacks, or a `CallbackList`.
        """
        self._marks.clear()  # of an attempt that was interrupted
        watched: list[Any] = []
        for callback in getattr(callbacks, "callbacks", callbacks):
            hooks = _watched_hooks(callback)
            watched += self._around(callback, hooks) if hooks else [callback]
        if not isinstance(callbacks, keras.callbacks.CallbackList):
            return watched
        callbacks.callbacks = watched
        return callbacks

    def _around(self, callback: Any, hooks: Sequence[str]) -> list[Any]:
        """Puts callbacks before and after a callback, which compare where it is called."""
        before: dict[str, Callable[[], None]] = {}
        after: dict[str, Callable[[], None]] = {}
        for name in filter(functools.partial(_overrides, callback), hooks):
            before[name] = self.mark if name in _STEP_HOOKS else self.mark_known
            after[name] = self.settle
        return [_Calls(before), callback, _Calls(after)]

    def mark(self) -> None:
        """Notes the present weights."""
        self._marks.append(_Mark(_keras.Snapshot(self._variables()), self._count()))

    def mark_known(self) -> None:
        """Notes the present weights, to which a callback may go back later."""
        self.mark()
        self._training_digests.update(map(digest, self._variables()))

    def settle(self) -> None:
        """Reports a change since the last `mark`, if there is one."""
        if not self._marks:
            return
        mark = self._marks.pop()
        changed = mark.weights.changed()
        if not changed:
            return
        # A callback may also set the count back.
        updates = max(0, self._count() - mark.updates)
        if updates or not self._training_digests.issuperset(map(digest, changed)):
            self._note(updates)

    def accept(self) -> None:
        """Called when weights of a file were loaded whose history is known."""
        if self._marks:
            number = len(self._marks)
            self._marks.clear()
            self.mark_known()
            self._marks *= number

    def settle_meanwhile(self) -> None:
        """Reports a change before a callback has ended, such as when it saves the model."""
        if self._marks:
            number = len(self._marks)
            self.settle()
            self._marks.clear()
            self.mark_known()
            self._marks *= number

    def _count(self) -> int:
        return int(self._model.optimizer.iterations.numpy())

    def _variables(self) -> list[Any]:
        """Lists the weights, and what the optimizer keeps of gradients, such as momentum."""
        return [*self._model.weights, *_keras.slots_of(self._model.optimizer)]


class _Calls(keras.callbacks.Callback):  # type: ignore[misc]
    """Calls functions without arguments at some of its methods, by name."""

    def __init__(self, functions: dict[str, Callable[[], None]]) -> None:
        super().__init__()
        self._set_model = functions.pop("set_model", None)
        for name, function in functions.items():
            setattr(self, name, functools.partial(_call, function))

    def set_model(self, model: Any) -> None:
        super().set_model(model)
        if self._set_model is not None:
            self._set_model()


def _call(function: Callable[[], None], *_: Any, **__: Any) -> None:
    function()


def _is_own(callback: Any) -> bool:
    """Returns whether a callback runs the user's code, also as a `LambdaCallback`."""
    package = type(callback).__module__.split(".", 1)[0]
    return package not in ("keras", "tfdist") or any(
        n.startswith("on_") for n in vars(callback)
    )


def _watched_hooks(callback: Any) -> tuple[str, ...]:
    if _is_own(callback):
        return (*_HOOKS, *_STEP_HOOKS)
    if isinstance(callback, keras.callbacks.BackupAndRestore):
        return ("on_train_begin",)
    if isinstance(callback, keras.callbacks.LearningRateScheduler):
        return ("on_epoch_begin",)
    return ()


def _overrides(callback: Any, name: str) -> bool:
    method = getattr(getattr(callback, name), "__func__", None)
    return method is not getattr(keras.callbacks.Callback, name)
