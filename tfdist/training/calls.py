"""Wraps tfdist's public functions: hang detection, and models with methods of their own."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec

import keras

from tfdist import _keras, watchdog
from tfdist.errors import ArgumentError, DisagreementError, outside
from tfdist.step.prepared import take_out_of_scope
from tfdist.strategies.session import current
from tfdist.training import preflight, routing

P = ParamSpec("P")


_CALLBACK_ON_EACH_WORKER = (
    "tfdist: each of {number} workers runs your callbacks. One that makes or removes files "
    "should do it in a single worker: `if tfdist.is_chief(): ...`."
)


def watched(function: Callable[P, Any]) -> Callable[P, Any]:
    """Watches a public function for hangs, after a check that all workers call it.

    If the model's class overrides the method of that name, its method is called first. It may
    prepare its data there. When it calls Keras's method, `function` runs instead.
    """
    name = function.__name__
    keras_names = set(inspect.signature(getattr(keras.Model, name)).parameters)

    @functools.wraps(function)
    def direct(*args: P.args, **kwargs: P.kwargs) -> Any:
        if routing.is_running():  # called in a callback, so an outer call is watched
            return function(*args, **kwargs)
        model: Any = args[0] if args else kwargs.get("model")
        with contextlib.ExitStack() as stack:
            stack.enter_context(_keras.outside_scopes())
            if isinstance(model, keras.Model):
                kwargs["strategy"] = take_out_of_scope(model, kwargs.get("strategy", "auto"))
            strategy = current(kwargs.get("strategy", "auto")).strategy
            stack.enter_context(watchdog.calling(name, strategy))
            stack.enter_context(routing.running())
            if not strategy.elastic:  # workers that join later have missed this exchange
                preflight.check_call(strategy, name)
                watchdog.meet()
            try:
                return function(*args, **kwargs)
            except (ArgumentError, DisagreementError) as error:
                # The cause is in the caller's code, so tfdist's frames are left out.
                raise error.with_traceback(outside(error)) from error.__cause__
            except OSError as error:
                workers = strategy.place.num_workers
                if workers > 1:
                    error.add_note(_CALLBACK_ON_EACH_WORKER.format(number=workers))
                raise

    @functools.wraps(function)
    def public(*args: P.args, **kwargs: P.kwargs) -> Any:
        model: Any = args[0] if args else kwargs.get("model")
        overriding = routing.own_method(model, name)
        if overriding is None:
            return direct(*args, **kwargs)
        keras_arguments = {key: kwargs[key] for key in kwargs if key in keras_names}
        other_names = kwargs.keys() - keras_names - {"model"}
        other_arguments: Any = {key: kwargs[key] for key in other_names}
        with routing.redirected(model, name, functools.partial(direct, **other_arguments)):
            return overriding(*args[1:], **keras_arguments)

    public.direct = direct  # type: ignore[attr-defined]
    return public
