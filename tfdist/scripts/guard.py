"""Detects, on several workers, a script that trains without tfdist.

Without this check, each worker would train a model of its own, and the run would seem to
succeed.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import keras

from tfdist import _keras
from tfdist.errors import StrategyError
from tfdist.step.prepared import take_out_of_scope
from tfdist.step.state import variables_of
from tfdist.strategies.base import Strategy
from tfdist.strategies.whole import whole
from tfdist.training import routing

_REMEDY = (
    "Start it with `tfdist run --drop-in`, which leads model.fit to all workers, or call "
    "tfdist.fit(model, ...)."
)


def guard(strategy: Strategy) -> None:
    """Watches Keras for training outside of tfdist, until the process ends.

    Args:
        strategy: The strategy of this process, with several workers.
    """
    keras.Model.fit = _guarded_fit(keras.Model.fit, "model.fit")
    keras.Model.train_on_batch = _guarded_train_on_batch(keras.Model.train_on_batch, strategy)
    _keras.watch_updates(_check_update)


def _guarded_fit(original: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(model: Any, *args: Any, **kwargs: Any) -> Any:
        if not routing.is_running():
            _report(f"`{name}`")
        with routing.running():
            return original(model, *args, **kwargs)

    return method


def _guarded_train_on_batch(
    original: Callable[..., Any], strategy: Strategy
) -> Callable[..., Any]:
    """Computes the whole batch on every worker, then takes the chief's state."""

    @functools.wraps(original)
    def method(model: Any, *args: Any, **kwargs: Any) -> Any:
        if routing.is_running():
            return original(model, *args, **kwargs)
        if not routing.is_drop_in():
            _report("`model.train_on_batch`")
            return original(model, *args, **kwargs)
        _say_once(
            "`train_on_batch` computes its whole batch on every worker: the weights are those "
            "of one process, and it is no faster. `fit` splits batches among the workers."
        )
        with routing.running(), _keras.outside_scopes():
            take_out_of_scope(model, "auto")
            result = original(model, *args, **kwargs)
        if strategy.place.num_workers > 1:
            with strategy.waiting_for("the end of train_on_batch"):
                whole(strategy).take_chiefs(variables_of(model))
        return result

    return method


def _check_update() -> None:
    """Called when an optimizer updates weights outside of a replica's step."""
    if routing.is_running():
        return
    if not routing.is_drop_in():
        _report("a training loop of its own")
    else:
        _say_once(
            "the script's own training loop runs on every worker independently: --drop-in "
            "distributes model.fit, evaluate, predict and train_on_batch, and no loop. "
            "Workers that draw the same data train the same weights, no faster."
        )


def _report(call: str) -> None:
    """Raises if the script does not use tfdist, else prints a warning."""
    if _names_tfdist():
        _say_once(f"{call} is Keras's own and trains this worker alone. {_REMEDY}")
        return
    raise StrategyError(
        "Workers that `tfdist run` starts must train together. Received: a script that trains "
        f"with {call} and never names tfdist, so that every worker would train a model of its "
        f"own. {_REMEDY}"
    )


def _names_tfdist() -> bool:
    values = list(vars(sys.modules["__main__"]).values())
    names = [getattr(v, "__name__", "") if isinstance(v, type(sys)) else "" for v in values]
    names += [getattr(value, "__module__", None) or "" for value in values]
    return any(str(name).partition(".")[0] == "tfdist" for name in names)


@functools.cache
def _say_once(text: str) -> None:
    print(f"tfdist: {text}", file=sys.stderr, flush=True)
