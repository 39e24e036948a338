"""Calls of tfdist's public functions: watched for hangs, led through a model's own methods."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec

import keras

from tfdist import _keras, watchdog
from tfdist.errors import ArgumentError, DisagreementError, outside
from tfdist.step.prepared import scoped
from tfdist.strategies.session import current
from tfdist.training import preflight, routing

P = ParamSpec("P")


_ONE_OF_ALL = (
    "tfdist: each of {number} workers runs your callbacks. One that makes or removes files "
    "should do it in a single worker: `if tfdist.is_chief(): ...`."
)


def watched(function: Callable[P, Any]) -> Callable[P, Any]:
    """Watches a public function for hangs, once the workers were found to have called it.

    A model whose class has a method of that name prepares its data there, and then calls
    Keras's, in whose place the function is.
    """
    name = function.__name__
    keras_names = set(inspect.signature(getattr(keras.Model, name)).parameters)

    @functools.wraps(function)
    def direct(*args: P.args, **kwargs: P.kwargs) -> Any:
        if routing.is_running():  # in a callback: of a call that is watched
            return function(*args, **kwargs)
        model: Any = args[0] if args else kwargs.get("model")
        with contextlib.ExitStack() as stack:
            stack.enter_context(_keras.outside_scopes())
            if isinstance(model, keras.Model):
                kwargs["strategy"] = scoped(model, kwargs.get("strategy", "auto"))
            used = current(kwargs.get("strategy", "auto")).strategy
            stack.enter_context(watchdog.calling(name, used))
            stack.enter_context(routing.running())
            if not used.elastic:  # whoever joins later has missed the call
                preflight.check_call(used, name)
                watchdog.meet()
            try:
                return function(*args, **kwargs)
            except (ArgumentError, DisagreementError) as error:
                # They are about the caller's arguments: tfdist's lines say nothing of them.
                raise error.with_traceback(outside(error)) from error.__cause__
            except OSError as error:
                if used.place.num_workers > 1:
                    error.add_note(_ONE_OF_ALL.format(number=used.place.num_workers))
                raise

    @functools.wraps(function)
    def public(*args: P.args, **kwargs: P.kwargs) -> Any:
        model: Any = args[0] if args else kwargs.get("model")
        own = routing.own_method(model, name)
        if own is None:
            return direct(*args, **kwargs)
        known = {key: kwargs[key] for key in kwargs if key in keras_names}
        more: Any = {key: kwargs[key] for key in kwargs.keys() - keras_names - {"model"}}
        with routing.led(model, name, functools.partial(direct, **more)):
            return own(*args[1:], **known)

    public.direct = direct  # type: ignore[attr-defined]
    return public
