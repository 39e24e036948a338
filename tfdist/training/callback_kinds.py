"""What Keras's callbacks do, as far as a kind of training must know it.

A room that refuses or helps a callback asks here, and knows no class of Keras's.
"""

from __future__ import annotations

from typing import Any

import keras


def _classes(*names: str) -> tuple[type, ...]:
    """Returns the classes of these names that this Keras has."""
    return tuple(getattr(keras.callbacks, n) for n in names if hasattr(keras.callbacks, n))


_SAVING = _classes("ModelCheckpoint", "OrbaxCheckpoint")
_WRITING = (
    *_SAVING,
    *_classes("BackupAndRestore", "CSVLogger", "RemoteMonitor", "TensorBoard"),
)


def listed(callbacks: Any) -> list[Any]:
    """Lists callbacks.

    Args:
        callbacks: As in `fit`: a callback, a list of them, a `CallbackList`, or None.
    """
    callbacks = getattr(callbacks, "callbacks", callbacks)
    callbacks = callbacks if isinstance(callbacks, list | tuple) else [callbacks]
    return [callback for callback in callbacks if callback is not None]


def writes(callback: Any) -> bool:
    """Tells whether a callback writes files or sends messages, which one process should do.

    Args:
        callback: Any object, also one that is no callback.
    """
    return isinstance(callback, _WRITING)


def saves_model(callback: Any) -> bool:
    """Tells whether a callback saves the model or its weights.

    Args:
        callback: The callback.
    """
    return isinstance(callback, _SAVING)


def saves_between_steps(callback: Any) -> bool:
    """Tells whether a callback saves the model within an epoch too.

    Args:
        callback: The callback.
    """
    return saves_model(callback) and getattr(callback, "save_freq", "epoch") != "epoch"


def is_board(callback: Any) -> bool:
    """Tells whether a callback writes for TensorBoard, in its `log_dir`.

    Args:
        callback: The callback.
    """
    return isinstance(callback, keras.callbacks.TensorBoard)


def shows_weights(callback: Any) -> bool:
    """Tells whether a callback writes pictures or histograms of weights.

    Args:
        callback: The callback.
    """
    return is_board(callback) and bool(callback.histogram_freq or callback.write_images)


def keeps_weights(callback: Any) -> bool:
    """Tells whether a callback keeps the best weights in memory.

    Args:
        callback: The callback.
    """
    is_stopping = isinstance(callback, keras.callbacks.EarlyStopping)
    return is_stopping and bool(callback.restore_best_weights)


def backs_up(callback: Any) -> bool:
    """Tells whether a callback saves and restores a whole training.

    Args:
        callback: The callback.
    """
    return isinstance(callback, keras.callbacks.BackupAndRestore)


def swaps_weights(callback: Any) -> bool:
    """Tells whether a callback exchanges the weights with their averages.

    Args:
        callback: The callback.
    """
    return isinstance(callback, keras.callbacks.SwapEMAWeights)


def is_history(callback: Any) -> bool:
    """Tells whether a callback is a `History`, which `fit` returns.

    Args:
        callback: Any object, also one that is no callback.
    """
    return isinstance(callback, keras.callbacks.History)


def counted_rows(callback: Any) -> Any:
    """Returns the rows of which a callback counts single ones, or None.

    A callback says so by an attribute `counted_rows`, as `tfdist.PerClassMetrics` does.

    Args:
        callback: The callback.
    """
    return getattr(callback, "counted_rows", None)


def scales_rate_by_replicas(callback: Any) -> bool:
    """Tells whether a callback takes the batch to grow with the number of replicas.

    A callback says so by an attribute, as `tfdist.LearningRateScaling` does.

    Args:
        callback: The callback.
    """
    return bool(getattr(callback, "scales_rate_by_replicas", False))
