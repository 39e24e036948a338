"""Which attributes of a callback are its state: what a checkpoint saves and may put back.

A checkpoint may come from somebody else. So it may put back counts and best values, but not
where a callback writes, nor its methods.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Mapping
from types import CodeType
from typing import Any

# Keras sets these in each process.
_NOT_STATE = ("_model", "model", "params", "validation_data")

_SAVING = frozenset({"_batches_seen_since_last_saving", "_last_batch_seen", "_current_epoch"})
# `min_delta` is never state: Keras changes its sign when it chooses `monitor_op`, a function,
# at the end of the first epoch of each process.
_STATE_OF_KERAS: Mapping[str, frozenset[str]] = {
    "Callback": frozenset(),
    "MonitorCallback": frozenset({"best"}),
    "History": frozenset({"history", "epoch"}),
    "EarlyStopping": frozenset({"wait", "stopped_epoch", "best", "best_weights", "best_epoch"}),
    "ReduceLROnPlateau": frozenset({"wait", "cooldown_counter", "best"}),
    "ModelCheckpoint": _SAVING | {"best"},
    "BackupAndRestore": _SAVING,
    "OrbaxCheckpoint": _SAVING | {"best", "_total_batches_seen"},
    "CSVLogger": frozenset({"keys", "append_header"}),
    "TensorBoard": frozenset(
        {
            "_batch_start_time",
            "_epoch_start_time",
            "_global_test_batch",
            "_global_train_batch",
            "_is_tracing",
            "_previous_epoch_iterations",
            "_profiler_started",
            "_should_write_train_graph",
            "_train_accumulated_time",
        }
    ),
    "SwapEMAWeights": frozenset({"_ema_weights_in_model"}),
    "LambdaCallback": frozenset(),
    "LearningRateScheduler": frozenset(),
    "RemoteMonitor": frozenset(),
    "TerminateOnNaN": frozenset(),
}


def is_state(callback: Any, attribute: str, value: Any) -> bool:
    """Returns whether an attribute of a callback may be state.

    Of a class of Keras it is what a list here names. Of another class it is any attribute that
    is not also a method or a property. What such a class inherits from Keras's as a setting may
    only be a number: a subclass may change its patience, but not its file.

    Args:
        callback: The callback.
        attribute: The name of the attribute.
        value: Its value now, or the one to put back.
    """
    if attribute in _NOT_STATE or attribute.startswith("__") or not attribute.isidentifier():
        return False
    of_keras = [kind for kind in type(callback).__mro__ if _is_of_keras(kind)]
    if any(attribute in _STATE_OF_KERAS.get(kind.__name__, ()) for kind in of_keras):
        return True
    if type(callback).__name__ in _STATE_OF_KERAS and _is_of_keras(type(callback)):
        return False
    if any(attribute in _settings(kind) for kind in of_keras):
        is_monitor_sign = attribute == "min_delta"
        is_of_user = not _is_of_keras(type(callback))
        return is_of_user and not is_monitor_sign and type(value) in (bool, int, float)
    in_class = inspect.getattr_static(type(callback), attribute, None)
    return not callable(in_class) and not hasattr(type(in_class), "__get__")


def _is_of_keras(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "keras"


@functools.cache
def _settings(kind: type) -> frozenset[str]:
    """Returns the names that a class of Keras uses for its attributes."""
    functions = [f for f in vars(kind).values() if inspect.isfunction(f)]
    if kind.__name__ in _STATE_OF_KERAS:
        return frozenset(name for function in functions for name in _names(function.__code__))
    # A class that Keras did not have when this was written.
    return frozenset(n for f in functions if f.__name__ == "__init__" for n in _parameters(f))


def _names(code: CodeType) -> set[str]:
    """Returns the names of attributes to which a function assigns."""
    stored = {i.argval for i in dis.get_instructions(code) if i.opname == "STORE_ATTR"}
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return {*stored, *(name for each in inner for name in _names(each))}


def _parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)
