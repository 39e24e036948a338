"""Checks before any work: the model, the numbers, and that the workers agree."""

from __future__ import annotations

import contextlib
import platform
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist import data
from tfdist._version import __version__
from tfdist.errors import ArgumentError, DisagreementError
from tfdist.strategies.base import Strategy
from tfdist.strategies.session import Session
from tfdist.training.callbacks import writer_that_calls


def compiled(model: Any) -> Any:
    """Gives the compiled model that `fit` was given, or that the given function makes.

    Args:
        model: A `keras.Model` or a function without arguments.

    Raises:
        ArgumentError: It is neither, or the model is not compiled.
    """
    made = model if isinstance(model, keras.Model) or not callable(model) else model()
    if not isinstance(made, keras.Model):
        raise ArgumentError(
            "`model` must be a compiled keras.Model or a function that returns one. "
            f"Received: model={made!r}."
        )
    if not made.compiled:
        raise ArgumentError(
            "`model` must be compiled. Received: a model without optimizer and loss. "
            "Call model.compile(optimizer=..., loss=...) first."
        )
    if type(made.optimizer).__module__.partition(".")[0] == "horovod":
        raise ArgumentError(
            "`model` must be compiled with a plain optimizer: Horovod's DistributedOptimizer "
            "reduces nothing under Keras 3. Received: a model with a DistributedOptimizer. "
            "Compile with what it wraps; tfdist.Horovod(...) has its options."
        )
    return made


def check_counts(**counts: Any) -> None:
    """Refuses numbers of epochs that are none.

    Args:
        **counts: Values by the name of their argument.

    Raises:
        ArgumentError: One is not a whole number, or negative.
    """
    for name, value in counts.items():
        if not isinstance(value, int) or value < 0:
            raise ArgumentError(
                f"`{name}` must be a whole number, 0 or more. Received: {name}={value!r}."
            )


def check_steps(**steps: Any) -> None:
    """Refuses numbers of steps that are none.

    Args:
        **steps: Values by the name of their argument; None means all of the data.

    Raises:
        ArgumentError: One is not a whole number, or below 1.
    """
    for name, value in steps.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ArgumentError(
                f"`{name}` must be a whole number of at least 1, or None for all of the data. "
                f"Received: {name}={value!r}."
            )


def check_call(strategy: Strategy, name: str) -> None:
    """Compares which function the workers have called, before anything is done.

    Args:
        strategy: Where the replicas are.
        name: Of the function.

    Raises:
        DisagreementError: Another one was called elsewhere, or none.
    """
    writer = writer_that_calls() if strategy.place.num_workers > 1 else None
    if writer is not None:
        raise DisagreementError(
            f"`{name}` must be called on every worker. Received: a call from the callback "
            f"{type(writer).__name__}, which the chief alone runs, as it does all that write. "
            "Call it in a keras.callbacks.Callback before this one, and leave the result in "
            "`logs`."
        )
    # Who is not in a call of these has sent what it exchanges just now.
    called = [
        f"`{other}`" if isinstance(other, str) else "another exchange"
        for other in strategy.gather_objects(name)
    ]
    if any(other != f"`{name}`" for other in called):
        listed = "; ".join(f"worker {i}: {other}" for i, other in enumerate(called))
        raise DisagreementError(
            f"All workers must call the same functions in the same order. Received: {listed}. "
            "Look for `if tfdist.is_chief():` and other conditions around `fit`, `evaluate` "
            "and `predict`."
        )


def check_batched(model: Any, x: Any, batch: Any) -> None:
    """Refuses a `tf.data.Dataset` of examples where a model takes batches of them.

    Only where Keras could not train either: a model without methods of its own has inputs of
    one dimension more than `x`, or all that is yielded are scalars.

    Args:
        model: A `keras.Model`.
        x: What `fit`, `evaluate` or `predict` was given.
        batch: What the source says of a batch.

    Raises:
        ArgumentError: It is such.
    """
    is_plain = type(model).__module__.partition(".")[0] == "keras"
    if not isinstance(x, tf.data.Dataset) or not is_plain:
        return
    inputs: list[Any] = []
    with contextlib.suppress(AttributeError, ValueError):  # of models that have not run yet
        inputs = tf.nest.flatten(model.inputs)
    parts = tf.nest.flatten(batch)
    ranks = [part.shape.rank for part in tf.nest.flatten(_x_of(batch))]
    if None in ranks:
        return
    # Keras adds a last dimension of 1 itself.
    misses = inputs and all(tensor.shape[-1:] != (1,) for tensor in inputs)
    too_low = misses and sorted(ranks) == sorted(len(t.shape) - 1 for t in inputs)
    if too_low or all(part.shape.rank == 0 for part in parts):
        shapes = ", ".join(str(tuple(part.shape)) for part in parts)
        raise ArgumentError(
            "A tf.data.Dataset must yield batches, whose first dimension is of examples. "
            f"Received: one of elements with shapes {shapes}. Call .batch(batch_size) on it."
        )


def _x_of(batch: Any) -> Any:
    return keras.utils.unpack_x_y_sample_weight(batch)[0]


def check_agreement(
    session: Session, model: Any, asked: dict[str, Any], source: data.Source
) -> None:
    """Compares what the workers were asked to do, before any of it is done.

    Args:
        session: This process's place.
        model: A built `keras.Model`.
        asked: What must be the same, by name.
        source: The data.

    Raises:
        DisagreementError: Something differs; it and each worker's value are named.
    """
    if session.strategy.place.num_workers == 1:
        return
    mine = {
        "versions": f"tfdist {__version__}, keras {keras.__version__}, tensorflow "
        f"{tf.__version__}, numpy {np.__version__}, python {platform.python_version()}",
        "model": [f"{v.path} {tuple(v.shape)} {v.dtype}" for v in model.variables],
        "data": source.fingerprint(),
        **asked,
    }
    everyone = session.strategy.gather_objects(mine)
    for name in dict.fromkeys(key for facts in everyone for key in facts):
        values = [facts.get(name) for facts in everyone]
        if any(value != values[0] for value in values):
            seen = data.difference(source, session.strategy) if name == "data" else None
            _raise_disagreement(name, values, seen)


def _raise_disagreement(name: str, values: list[Any], seen: str | None) -> None:
    if isinstance(values[0], list):  # of a model's variables, only what differs
        common = set.intersection(*(set(value or []) for value in values))
        values = [[line for line in value or [] if line not in common] for value in values]
    listed = "; ".join(f"worker {i}: {value}" for i, value in enumerate(values))
    remedy = {
        "data": "Give every worker the same data in the same order; seed what draws it.",
        "versions": "Install the same versions on every host.",
    }.get(name, "Start the same script with the same arguments on every worker.")
    raise DisagreementError(
        f"All workers must be given the same {name}. Received: {seen or listed}. {remedy}"
    )
