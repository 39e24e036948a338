"""Keras's own loop, which calls what tfdist gives it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
from keras.src.trainers.data_adapters.data_adapter import DataAdapter as _DataAdapter
from keras.src.trainers.epoch_iterator import EpochIterator as _EpochIterator

from tfdist._keras.building import compiled_state, is_compiled_as
from tfdist._keras.replica import replaced
from tfdist.errors import ArgumentError


class StreamAdapter(_DataAdapter):  # type: ignore[misc]
    """Hands a tfdist stream to Keras's loop, which takes a `DataAdapter` as it is.

    Args:
        stream: Iterable, one iteration an epoch.
        num_batches: Steps an epoch, or None when unknown.
        on_epoch_end: Called by Keras when an epoch of data ends.
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
        """Returns the stream: the default strategy's `distribute_dataset` leaves it be."""
        return self._stream

    @property
    def num_batches(self) -> int | None:
        """Steps an epoch, or None when unknown."""
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
        """Nothing to do: a stream starts its epoch when its first element is drawn."""

    def on_epoch_end(self) -> None:
        """Tells the source that its epoch is over."""
        if self._on_epoch_end is not None:
            self._on_epoch_end()


def around(callbacks: Any, first: Sequence[Any] = (), last: Sequence[Any] = ()) -> Any:
    """Puts callbacks before and after all others.

    Args:
        callbacks: A list of callbacks, or a `CallbackList`.
        first: That come before.
        last: That come after.

    Returns:
        Of the kind that was given.
    """
    if not isinstance(callbacks, keras.callbacks.CallbackList):
        return [*first, *callbacks, *last]
    callbacks.callbacks = [*first, *callbacks.callbacks, *last]
    return callbacks


# As Keras defines them, whatever `tfdist.drop_in()` puts in their place.
FIT = keras.Model.fit
EVALUATE = keras.Model.evaluate
PREDICT = keras.Model.predict


@contextlib.contextmanager
def loop_functions(
    model: Any, kinds: tuple[type, ...], **functions: Callable[..., Any]
) -> Iterator[None]:
    """Makes Keras's loop call other functions than it would build for itself.

    `make_train_function` and its siblings return early when the attribute is set. What a
    callback evaluates or predicts meanwhile on data of its own, Keras's functions do.

    Args:
        model: A `keras.Model`.
        kinds: The classes of what a `StreamAdapter`'s stream gives.
        **functions: `train_function`, `test_function`, `predict_function`, for those.
    """
    before = {name: getattr(model, name) for name in functions}
    own: dict[str, Callable[..., Any]] = {}
    is_outermost = "_get_metrics_result_or_logs" not in vars(model)
    results = model._get_metrics_result_or_logs
    has_made_steps = False

    def results_of_steps(logs: Any) -> Any:
        """Gives no zeros as the results of an epoch without a step, as Keras does."""
        nonlocal has_made_steps
        made, has_made_steps = has_made_steps, False
        found = results(logs)
        return found if made else dict.fromkeys(found, math.nan)

    def dispatching(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def dispatch(data: Any) -> Any:
            nonlocal has_made_steps
            first = data[0] if isinstance(data, list) else data
            if isinstance(first, kinds):
                made = function(data)
            else:
                if name not in own:
                    setattr(model, name, None)
                    getattr(model, f"make_{name}")()
                    own[name] = getattr(model, name)
                    setattr(model, name, dispatch)
                made = own[name](data)
            has_made_steps = True
            return made

        return dispatch

    compiled, make = compiled_state(model), model.make_train_function
    own_make = vars(model).get("make_train_function")

    def make_train_function(force: bool = False) -> Any:
        """Refuses a model that was compiled again: its optimizer is nobody's."""
        if not is_compiled_as(model, compiled):
            raise ArgumentError(
                "A model must not be compiled while it trains. Received: a callback that calls "
                "`compile` and `make_train_function`. End this `fit`, compile, and go on in "
                "another one, with `initial_epoch`."
            )
        return make(force)

    vars(model)["make_train_function"] = make_train_function
    for name, function in functions.items():
        setattr(model, name, dispatching(name, function))
    vars(model)["_get_metrics_result_or_logs"] = results_of_steps
    try:
        yield
    finally:
        if is_outermost:
            del vars(model)["_get_metrics_result_or_logs"]
        else:
            vars(model)["_get_metrics_result_or_logs"] = results
        if own_make is None:
            del vars(model)["make_train_function"]
        else:
            vars(model)["make_train_function"] = own_make
        for name, function in before.items():
            setattr(model, name, function)


@contextlib.contextmanager
def end_of_data_unless(is_stopped: Callable[[], bool]) -> Iterator[None]:
    """Keeps Keras's loop from calling a stop an input that ran out.

    Args:
        is_stopped: Tells whether a `StopIteration` was a stop.
    """
    warn = _EpochIterator._interrupted_warning

    def interrupted_warning(iterator: Any) -> None:
        if not is_stopped():
            warn(iterator)

    with replaced(_EpochIterator, "_interrupted_warning", interrupted_warning):
        yield
