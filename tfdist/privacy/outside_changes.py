"""Notices what callbacks do to the weights of a model in private training."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist.privacy.model_history import digest

# All weights are compared here, ...
_HOOKS = (
    "on_train_begin", "on_train_end", "on_epoch_begin", "on_epoch_end", "on_test_begin",
    "on_test_end",
)  # fmt: skip
# ... and a sample of them here.
_STEP_HOOKS = (
    "on_train_batch_begin", "on_train_batch_end", "on_test_batch_begin", "on_test_batch_end",
    "on_batch_begin", "on_batch_end",
)  # fmt: skip
_SAMPLE = 256


class OutsideChanges:
    """Compares the weights before and after each of the user's own callbacks.

    Callbacks of Keras and tfdist are trusted: they restore or average weights. Weights that the
    training had at an earlier call of a callback are no change, since what is computed from
    released weights is private.

    Args:
        model: A compiled `keras.Model`.
        note: Called for a change, with the number of updates that the optimizer has counted.
    """

    def __init__(self, model: Any, note: Callable[[int], None]) -> None:
        self._model, self._note = model, note
        self._training_digests: set[bytes] = set()
        self._state: list[bytes] | None = None
        self._sample: list[bytes] | None = None
        self._iterations = 0

    def watched(self, callbacks: Any) -> Any:
        """Adds callbacks before and after each of the user's own ones.

        Args:
            callbacks: A list of callbacks, or a `CallbackList`.
        """
        self._state = self._sample = None  # of an attempt that was interrupted
        watched: list[Any] = []
        for callback in getattr(callbacks, "callbacks", callbacks):
            watched += self._around(callback) if _is_own(callback) else [callback]
        if not isinstance(callbacks, keras.callbacks.CallbackList):
            return watched
        callbacks.callbacks = watched
        return callbacks

    def _around(self, callback: Any) -> list[Any]:
        """Puts callbacks before and after a callback, which compare where it is called."""
        before: dict[str, Callable[[], None]] = {}
        after: dict[str, Callable[[], None]] = {}
        for name in filter(functools.partial(_overrides, callback), (*_HOOKS, *_STEP_HOOKS)):
            before[name] = self.mark_sample if name in _STEP_HOOKS else self.mark
            after[name] = self.accept_restored if name == "on_train_begin" else self.settle
        return [_Calls(before), callback, _Calls(after)]

    def mark(self) -> None:
        """Notes the present weights as those of the training."""
        self._iterations = self._count()
        self._state = self._digests()
        self._training_digests.update(self._state)

    def mark_sample(self) -> None:
        """Notes a sample of the present weights, which is quick enough for every step."""
        self._iterations = self._count()
        self._sample = self._samples()

    def settle(self) -> None:
        """Reports a change since `mark` or `mark_sample`, if there is one."""
        state, sample = self._state, self._sample
        self._state = self._sample = None
        if state is not None and self._digests() == state:
            return
        if state is None and (sample is None or self._samples() == sample):
            return
        # A callback may also set the count back.
        updates = max(0, self._count() - self._iterations)
        if updates or not self._training_digests.issuperset(self._digests()):
            self._note(updates)

    def accept(self) -> None:
        """Called when weights of a file were loaded whose history is known."""
        if self._state is not None:
            self.mark()
        if self._sample is not None:
            self.mark_sample()

    def accept_restored(self) -> None:
        """Settles at the beginning, where a callback may restore weights and optimizer."""
        if self._count() != self._iterations:
            self._state = None
        self.settle()

    def _count(self) -> int:
        return int(self._model.optimizer.iterations.numpy())

    def _digests(self) -> list[bytes]:
        return [digest(variable) for variable in self._model.weights]

    def _samples(self) -> list[bytes]:
        samples = []
        for variable in self._model.weights:
            size = int(np.prod(variable.shape))
            numbers = np.linspace(0, size - 1, min(size, _SAMPLE)).astype(np.int64)
            flat = tf.reshape(variable.value, [-1])
            samples.append(tf.gather(flat, numbers).numpy().tobytes())
        return samples


class _Calls(keras.callbacks.Callback):  # type: ignore[misc]
    """Calls functions without arguments at some of its methods, by name."""

    def __init__(self, functions: dict[str, Callable[[], None]]) -> None:
        super().__init__()
        for name, function in functions.items():
            setattr(self, name, functools.partial(_call, function))


def _call(function: Callable[[], None], *_: Any, **__: Any) -> None:
    function()


def _is_own(callback: Any) -> bool:
    """Returns whether a callback runs the user's code, also as a `LambdaCallback`."""
    package = type(callback).__module__.split(".", 1)[0]
    return package not in ("keras", "tfdist") or any(
        n.startswith("on_") for n in vars(callback)
    )


def _overrides(callback: Any, name: str) -> bool:
    method = getattr(getattr(callback, name), "__func__", None)
    return method is not getattr(keras.callbacks.Callback, name)
