"""Refuses callbacks that use the training data without noise for decisions or files."""

from __future__ import annotations

import contextlib
import string
from collections.abc import Collection, Sequence
from typing import Any

import keras
from keras import callbacks as keras_callbacks

from tfdist.errors import ArgumentError

_NOISY = ("epsilon", "l2_norm_clip", "learning_rate")
_COUNTS = ("epoch", "batch")
_BEST_ONLY = tuple(
    getattr(keras_callbacks, name)
    for name in ("ModelCheckpoint", "OrbaxCheckpoint")
    if hasattr(keras_callbacks, name)
)


def check_callbacks(callbacks: Sequence[Any]) -> None:
    """Refuses callbacks whose decisions or files would not be private.

    The training loss has no noise. So the end of training, the choice of weights and the
    learning rate must not depend on it. Files must not contain losses of single batches, which
    may have very few examples. Names of files of weights must not contain any loss.

    Args:
        callbacks: Keras callbacks. Custom code, such as that of a `LambdaCallback`, cannot be
            checked.

    Raises:
        ArgumentError: A callback is not private.
    """
    for callback in callbacks:
        kind = type(callback).__name__
        if isinstance(callback, keras_callbacks.TerminateOnNaN):
            raise ArgumentError(
                "The end of private training must not depend on a loss without noise. "
                f"Received: {kind}, with which one example can end it. Leave it out: examples "
                "whose gradient is not finite count as 0."
            )
        monitor = getattr(callback, "monitor", None)
        if _decides(callback) and not _may_be_public(monitor):
            raise _decides_by_training(callback)
        # Keras fills the names in from the logs, which have the training loss.
        if not all(map(_may_be_public, _names_in_path(callback).difference(_COUNTS))):
            raise _named_by_training(callback)
        frequency = getattr(callback, "update_freq", "epoch")
        if isinstance(callback, keras_callbacks.TensorBoard) and frequency != "epoch":
            raise ArgumentError(
                "Private training must not save the losses of single batches, which have no "
                f"noise and may be of one example. Received: {kind} with "
                f"update_freq={frequency!r}. Use update_freq='epoch', and do not publish the "
                "files."
            )


def check_names(callbacks: Sequence[Any], names: Collection[str]) -> None:
    """Refuses callbacks that use a training metric, also one whose name begins with val_.

    Args:
        callbacks: Keras callbacks.
        names: The names that a training step logs without noise.

    Raises:
        ArgumentError: A callback monitors one of them, or names files by it.
    """
    for callback in callbacks:
        if _decides(callback) and callback.monitor in names:
            raise _decides_by_training(callback)
        if not _names_in_path(callback).isdisjoint(names):
            raise _named_by_training(callback)


class StepLogs(keras.callbacks.Callback):  # type: ignore[misc]
    """Checks the names that training steps log. Other names are those of validation.

    Args:
        callbacks: The callbacks of the training.
        noisy: The names of logged values that have noise.
    """

    def __init__(self, callbacks: Sequence[Any], noisy: Collection[str]) -> None:
        super().__init__()
        self._callbacks, self._noisy = callbacks, noisy

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Refuses a callback before it decides anything."""
        check_names(self._callbacks, set(logs or {}).difference(self._noisy))


def _decides_by_training(callback: Any) -> ArgumentError:
    return ArgumentError(
        "Private training must not depend on a loss or metric of the training data, which has "
        f"no noise. Received: {type(callback).__name__} with monitor={callback.monitor!r}. Use "
        "one of data that need not be protected, such as monitor='val_loss' with "
        "validation_data."
    )


def _named_by_training(callback: Any) -> ArgumentError:
    return ArgumentError(
        "In private training, names of weight files must not contain a loss or metric of the "
        f"training data, which has no noise. Received: {type(callback).__name__} with "
        f"filepath={callback.filepath!r}. Use {{epoch}}, or a metric of data that need not be "
        "protected, such as {val_loss} with validation_data."
    )


def _names_in_path(callback: Any) -> set[str]:
    """Returns the names that Keras replaces in the path of a callback's files."""
    if not isinstance(callback, _BEST_ONLY):
        return set()
    path, fields = str(getattr(callback, "filepath", "")), []
    with contextlib.suppress(ValueError):  # Keras will raise it, too
        fields = [field for _, field, _, _ in string.Formatter().parse(path) if field]
    return {field.split(".")[0].split("[")[0] for field in fields}


def _decides(callback: Any) -> bool:
    if isinstance(callback, _BEST_ONLY):
        return bool(callback.save_best_only)
    return isinstance(
        callback, keras_callbacks.EarlyStopping | keras_callbacks.ReduceLROnPlateau
    )


def decides_by_validation(callback: Any) -> bool:
    """Returns whether a callback decides by a loss or metric of validation.

    Args:
        callback: A Keras callback.
    """
    return _decides(callback) and str(callback.monitor).startswith("val_")


def _may_be_public(monitor: Any) -> bool:
    return str(monitor).startswith("val_") or monitor in _NOISY
