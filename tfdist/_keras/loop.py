"""Runs Keras's own loop with tfdist's data and functions."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
from keras.src.trainers.data_adapters.data_adapter import DataAdapter as _DataAdapter
from keras.src.trainers.epoch_iterator import EpochIterator as _EpochIterator

from tfdist._keras.building import compiled_state, is_compiled_as
from tfdist._keras.interception import replaced
from tfdist.errors import ArgumentError


class StreamAdapter(_DataAdapter):  # type: ignore[misc]
    """Passes a tfdist stream to Keras's loop, which uses a `DataAdapter` as it is.

    Args:
        stream: An iterable. One iteration is one epoch.
        num_batches: Number of steps of an epoch, or None if unknown.
        on_epoch_end: Keras calls it at the end of an epoch of data.
    """

    def __init__(
        self,
        stream: Any,
        num_batches: int | None,
        on_epoch_end: Callable[[], None] | None = None,
    ) -> None:
        self._stream = stream
        self._num_batches = num_batches
        self._on_epoch_end = on_epoch_end

    def get_tf_dataset(self) -> Any:
        """Returns the stream. The default strategy's `distribute_dataset` keeps it."""
        return self._stream

    @property
    def num_batches(self) -> int | None:
        """Number of steps of an epoch, or None if unknown."""
        return self._num_batches

    @property
    def batch_size(self) -> int | None:
        """Unknown: shares differ in size."""
        return None

    @property
    def has_partial_batch(self) -> bool | None:
        """Unknown."""
        return None

    @property
    def partial_batch_size(self) -> int | None:
        """Unknown."""
        return None

    def on_epoch_begin(self) -> None:
        """Does nothing: a stream starts its epoch when its first element is read."""

    def on_epoch_end(self) -> None:
        """Tells the source that its epoch is over."""
        if self._on_epoch_end is not None:
            self._on_epoch_end()


def around(callbacks: Any, first: Sequence[Any] = (), last: Sequence[Any] = ()) -> Any:
    """Puts callbacks before and after all others.

    Args:
        callbacks: A list of callbacks, or a `CallbackList`.
        first: Callbacks to put before the others.
        last: Callbacks to put after the others.

    Returns:
        A list or a `CallbackList`, as `callbacks`.
    """
    if not isinstance(callbacks, keras.callbacks.CallbackList):
        return [*first, *callbacks, *last]
    callbacks.callbacks = [*first, *callbacks.callbacks, *last]
    return callbacks


# Keras's own methods, which `tfdist.drop_in()` may replace later.
FIT = keras.Model.fit
EVALUATE = keras.Model.evaluate
PREDICT = keras.Model.predict


@contextlib.contextmanager
def loop_functions(
    model: Any,
    kinds: tuple[type, ...],
    before_other_training: Callable[[], None] | None = None,
    **functions: Callable[..., Any],
) -> Iterator[None]:
    """Makes Keras's loop call other functions than its own compiled functions.

    `make_train_function` and its siblings return early if the model has the function already.
    If a callback evaluates or predicts on other data, Keras's functions still run.

    Args:
        model: A `keras.Model`.
        kinds: The classes of the elements of a `StreamAdapter`'s stream. The functions are
            called for these.
        before_other_training: Called if a callback trains on other data.
        **functions: `train_function`, `test_function` and `predict_function`.
    """
    keras_functions: dict[str, Callable[..., Any]] = {}
    # A callback that evaluates is inside another such context, whose steps are not its own.
    get_results = model._get_metrics_result_or_logs
    get_results = getattr(get_results, "of_keras", get_results)
    has_run_steps = False

    def results_of_steps(logs: Any) -> Any:
        """Returns NaN, where Keras returns zeros, for an epoch without a step."""
        nonlocal has_run_steps
        had_steps, has_run_steps = has_run_steps, False
        results = get_results(logs)
        return results if had_steps else dict.fromkeys(results, math.nan)

    results_of_steps.of_keras = get_results  # type: ignore[attr-defined]

    def dispatching(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def dispatch(data: Any) -> Any:
            nonlocal has_run_steps
            first = data[0] if isinstance(data, list) else data
            if isinstance(first, kinds):
                result = function(data)
            else:
                if name == "train_function" and before_other_training is not None:
                    before_other_training()
                # Keras makes its own function only if the attribute is None.
                if name not in keras_functions:
                    setattr(model, name, None)
                    getattr(model, f"make_{name}")()
                    keras_functions[name] = getattr(model, name)
                    setattr(model, name, dispatch)
                result = keras_functions[name](data)
            has_run_steps = True
            return result

        return dispatch

    replacements = {
        "make_train_function": _refusing_compile(model),
        "_get_metrics_result_or_logs": results_of_steps,
        **{name: dispatching(name, function) for name, function in functions.items()},
    }
    with contextlib.ExitStack() as stack:
        for name, replacement in replacements.items():
            stack.enter_context(_replaced_attribute(model, name, replacement))
        yield


def _refusing_compile(model: Any) -> Callable[..., Any]:
    """Makes a `make_train_function` that raises if the model has been compiled again."""
    compiled, make = compiled_state(model), model.make_train_function

    def make_train_function(force: bool = False) -> Any:
        # tfdist has not moved the variables of the new optimizer.
        if not is_compiled_as(model, compiled):
            raise ArgumentError(
                "A model must not be compiled while it trains. Received: a callback that calls "
                "`compile` and `make_train_function`. End this `fit`, compile, and go on in "
                "another one, with `initial_epoch`."
            )
        return make(force)

    return make_train_function


@contextlib.contextmanager
def _replaced_attribute(model: Any, name: str, replacement: Any) -> Iterator[None]:
    """Replaces an attribute of a model itself. Its class's attribute shows again at the end."""
    # Not with `setattr`, through which Keras would track the replacement.
    is_own = name in vars(model)
    original = vars(model).get(name)
    vars(model)[name] = replacement
    try:
        yield
    finally:
        if is_own:
            vars(model)[name] = original
        else:
            vars(model).pop(name, None)


@contextlib.contextmanager
def end_of_data_unless(is_stopped: Callable[[], bool]) -> Iterator[None]:
    """Suppresses Keras's warning that the input ran out, if the steps were stopped instead.

    Args:
        is_stopped: Tells whether a `StopIteration` was a stop.
    """
    warn = _EpochIterator._interrupted_warning

    def interrupted_warning(iterator: Any) -> None:
        if not is_stopped():
            warn(iterator)

    with replaced(_EpochIterator, "_interrupted_warning", interrupted_warning):
        yield
