"""What `fit` would refuse for a model and its arguments, asked before a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tfdist import data
from tfdist.cluster import Cluster
from tfdist.compression.settings import PowerSGD
from tfdist.errors import TfdistError
from tfdist.sharding.extension import ShardedOptimizer
from tfdist.sharding.pipeline.plan import plan
from tfdist.step.composition import why_rows_mix
from tfdist.strategies.base import Place
from tfdist.strategies.choice.hardware import Hardware
from tfdist.strategies.session import Session
from tfdist.strategies.single import Single
from tfdist.strategies.zero import Zero
from tfdist.training.request import Request

_MICROBATCHES = 8


@dataclass(frozen=True)
class Call:
    """A call of `fit`: its model, its data and its other arguments by name."""

    model: Any
    x: Any = None
    y: Any = None
    others: Mapping[str, Any] = field(default_factory=dict)


def refused(
    model: Any, source: data.Source | None, call: Call, hardware: Hardware
) -> dict[str, str]:
    """Asks the code of each strategy what it refuses.

    Args:
        model: A compiled, built `keras.Model`.
        source: The data, if they are known.
        call: The call of `fit`.
        hardware: Where it would train.

    Returns:
        The reason, by the strategy's name in the table.
    """
    reasons = {}
    for name, stage in (("zero 1", 1), ("zero 3", 3), ("model parallel", 3)):
        sharded = ShardedOptimizer(Zero(stage), call.others.get("compression"))
        request = _request(model, call, Single(Cluster()))
        request.session.strategy.place = Place(2, 0, 1, 2)
        try:
            sharded.choose(request)
        except TfdistError as error:
            reasons[name] = received(error)
    others = [n for n in ("privacy", "compression", "federated") if call.others.get(n)]
    if isinstance(call.others.get("compression"), PowerSGD):
        reasons["parameter_server"] = "PowerSGD's state would be on servers"
    if call.others.get("federated"):
        reasons |= dict.fromkeys(
            ("parameter_server", "zero 1", "zero 3", "model parallel"), "fit has `federated`"
        )
    if others:
        reasons["pipeline"] = f"fit has `{others[0]}`"
    elif len(hardware.gpus) > 1:
        reason = _why_no_pipeline(model, source, len(hardware.gpus))
        if reason is not None:
            reasons["pipeline"] = reason
    return reasons


def _why_no_pipeline(model: Any, source: data.Source | None, stages: int) -> str | None:
    if model.run_eagerly:
        return "the model was compiled with run_eagerly=True"
    try:
        plan(model, [f"device:{i}" for i in range(stages)], _MICROBATCHES)
    except TfdistError as error:
        return received(error)
    return None if source is None else why_rows_mix(model, source)


def received(error: Exception) -> str:
    """Returns the part of a message that says what was received.

    Args:
        error: An error of tfdist's.

    Example:
        >>> received(ArgumentError("`a` must be 1. Received: a=2. Pass 1."))
        'a=2'
    """
    text = str(error).partition("Received: ")[2] or str(error)
    return text.partition(". ")[0].rstrip(".")


def _request(model: Any, call: Call, strategy: Any) -> Request:
    names = {f.name for f in dataclasses.fields(Request)}
    values: dict[str, Any] = dict.fromkeys(names) | {
        "session": Session(strategy, "", None),
        "model": model,
        "x": call.x,
        "y": call.y,
        "epochs": 1,
        "initial_epoch": 0,
        "copies": 1,
        "is_private": call.others.get("privacy") is not None,
    }
    values |= {name: value for name, value in call.others.items() if name in names}
    return Request(**values)
