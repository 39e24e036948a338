"""Runs a script up to its first `fit`, whose arguments are taken instead of a training."""

from __future__ import annotations

import contextlib
import gc
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import keras

from tfdist import api
from tfdist.errors import ArgumentError
from tfdist.scripts.refusals import Call
from tfdist.scripts.worker_main import run_script
from tfdist.strategies import session
from tfdist.training.routing import replacing


class _Captured(BaseException):
    """Ends the script. It is no `Exception`, so that a script's `except` does not keep it."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call


def first_fit(arguments: list[str]) -> Call:
    """Runs a script, and returns its first call of `fit`.

    What the script does before that call, it does: it reads its data and builds its model. No
    step is trained. Its output goes to standard error.

    Args:
        arguments: The script, or `-m` and a module, followed by its arguments.

    Raises:
        ArgumentError: The script ends before it calls `fit`, or raises an error.
    """
    script = arguments[1] if arguments[0] == "-m" else arguments[0]
    if arguments[0] != "-m" and not Path(script).is_file():
        raise ArgumentError(
            "The script must be a Python file. Received: "
            f"{script!r}, which is not there. Check the path."
        )
    batches: list[str] = []
    with _intercepted(batches), contextlib.redirect_stdout(sys.stderr):
        try:
            run_script(arguments)
        except _Captured as captured:
            return captured.call
        except SystemExit:
            pass
        except Exception as error:
            print("".join(traceback.format_exception(error)), file=sys.stderr)
            line = next(
                (f.lineno for f in reversed(traceback.extract_tb(error.__traceback__))
                 if Path(f.filename).name == Path(script).name), None
            )  # fmt: skip
            where = "" if line is None else f" at line {line}"
            raise ArgumentError(
                "The script must run up to its first `fit`. Received: "
                f"{script}, which raised {type(error).__name__}{where}: {error}. Run it with "
                "python first; arguments of the script go after its name."
            ) from None
    raise ArgumentError(
        "A script must call `Model.fit` or `tfdist.fit`. Received: "
        f"{script}, which ended without. {_what_was_found(batches)}"
    )


@contextlib.contextmanager
def _intercepted(batches: list[str]) -> Iterator[None]:
    """Replaces `fit` of Keras and of tfdist, and keeps this process alone."""
    parameters = inspect.signature(keras.Model.fit)

    def keras_fit(model: Any, *args: Any, **kwargs: Any) -> NoReturn:
        bound = parameters.bind(model, *args, **kwargs).arguments
        bound.pop("self", None)
        _capture(model, bound)

    own = inspect.signature(api.fit)

    def tfdist_fit(*args: Any, **kwargs: Any) -> NoReturn:
        bound = own.bind(*args, **kwargs).arguments
        _capture(bound.pop("model"), bound)

    tfdist_fit.direct = tfdist_fit  # type: ignore[attr-defined]  # the drop-in's

    def train_on_batch(model: Any, *args: Any, **kwargs: Any) -> Any:
        batches.append("train_on_batch")
        return trains(model, *args, **kwargs)

    trains = keras.Model.train_on_batch
    begin = session.init

    def init(strategy: Any = "auto", seed: Any = None, **settings: Any) -> Any:
        # Strategies of several workers cannot be connected in a process alone.
        return begin("single", seed, **settings)

    originals = (api.fit, session.init)
    with replacing({"fit": keras_fit, "train_on_batch": train_on_batch}):
        try:
            _replace(tfdist_fit, init)
            yield
        finally:
            _replace(*originals)


def _replace(fit: Callable[..., Any], init: Callable[..., Any]) -> None:
    api.fit = fit
    session.init = init


def _capture(model: Any, arguments: dict[str, Any]) -> NoReturn:
    x, y = arguments.pop("x", None), arguments.pop("y", None)
    raise _Captured(Call(model, x, y, arguments))


def _what_was_found(batches: list[str]) -> str:
    """Says what a script had that never called `fit`."""
    models = [value for value in gc.get_objects() if isinstance(value, keras.Model)]
    names = ", ".join(repr(model.name) for model in models[:3])
    if batches:
        return "Found: `train_on_batch`, a loop of its own. Pass module:function instead."
    if not models:
        return "Found: no model. If it trains in a function, call that function."
    compiled = "compiled" if any(model.compiled for model in models) else "not compiled"
    return (
        f"Found: {len(models)} model(s), {names}, {compiled}, and no `fit`. A training loop of "
        "its own cannot be examined: pass module:function, which returns a compiled model."
    )
