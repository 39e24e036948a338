"""Checks before training: the model, the arguments, and that all workers agree."""

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


def compiled_model(model: Any) -> Any:
    """Returns a compiled model.

    Args:
        model: A compiled `keras.Model`, or a function without arguments that returns one.

    Raises:
        ArgumentError: `model` is neither, or the model is not compiled.
    """
    result = model if isinstance(model, keras.Model) or not callable(model) else model()
    if not isinstance(result, keras.Model):
        raise ArgumentError(
            "`model` must be a compiled keras.Model or a function that returns one. "
            f"Received: model={result!r}."
        )
    if not result.compiled:
        raise ArgumentError(
            "`model` must be compiled. Received: a model without optimizer and loss. "
            "Call model.compile(optimizer=..., loss=...) first."
        )
    if type(result.optimizer).__module__.partition(".")[0] == "horovod":
        raise ArgumentError(
            "`model` must be compiled with a plain optimizer: Horovod's DistributedOptimizer "
            "reduces nothing under Keras 3. Received: a model with a DistributedOptimizer. "
            "Compile with the optimizer that it wraps; tfdist.Horovod(...) has its options."
        )
    return result


def check_counts(**counts: Any) -> None:
    """Checks that numbers of epochs are whole and not negative.

    Args:
        **counts: Values by the name of their argument.

    Raises:
        ArgumentError: A value is not a whole number, or negative.
    """
    for name, value in counts.items():
        if not isinstance(value, int) or value < 0:
            raise ArgumentError(
                f"`{name}` must be a whole number, 0 or more. Received: {name}={value!r}."
            )


def check_steps(**steps: Any) -> None:
    """Checks that numbers of steps are whole and positive.

    Args:
        **steps: Values by the name of their argument. None means all of the data.

    Raises:
        ArgumentError: A value is not a whole number, or below 1.
    """
    for name, value in steps.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ArgumentError(
                f"`{name}` must be a whole number of at least 1, or None for all of the data. "
                f"Received: {name}={value!r}."
            )


def check_call(strategy: Strategy, name: str) -> None:
    """Checks that all workers have called the same function, before it does any work.

    Args:
        strategy: The strategy.
        name: The function's name.

    Raises:
        DisagreementError: Another worker has called another function, or none.
    """
    writer = writer_that_calls() if strategy.place.num_workers > 1 else None
    if writer is not None:
        raise DisagreementError(
            f"`{name}` must be called on every worker. Received: a call from the callback "
            f"{type(writer).__name__}, which only the chief runs, because it writes files. "
            "Call it in a keras.callbacks.Callback before this one, and leave the result in "
            "`logs`."
        )
    # A worker that is elsewhere in its script takes part with the object of another exchange.
    calls = [
        f"`{value}`" if isinstance(value, str) else "another exchange"
        for value in strategy.gather_objects(name)
    ]
    if any(call != f"`{name}`" for call in calls):
        listed = "; ".join(f"worker {i}: {call}" for i, call in enumerate(calls))
        raise DisagreementError(
            f"All workers must call the same functions in the same order. Received: {listed}. "
            "Look for `if tfdist.is_chief():` and other conditions around `fit`, `evaluate` "
            "and `predict`."
        )


def check_batched(model: Any, x: Any, batch: Any) -> None:
    """Checks that a `tf.data.Dataset` yields batches, not single examples.

    It raises only if Keras could not train either: if a model without methods of its own has
    inputs of one dimension more than `x`, or if the data set yields only scalars.

    Args:
        model: A `keras.Model`.
        x: The `x` of `fit`, `evaluate` or `predict`.
        batch: The source's spec of a batch.

    Raises:
        ArgumentError: The data set yields single examples.
    """
    is_plain = type(model).__module__.partition(".")[0] == "keras"
    if not isinstance(x, tf.data.Dataset) or not is_plain:
        return
    inputs: list[Any] = []
    with contextlib.suppress(AttributeError, ValueError):  # raised if the model is not built
        inputs = tf.nest.flatten(model.inputs)
    parts = tf.nest.flatten(batch)
    ranks = [part.shape.rank for part in tf.nest.flatten(_x_of(batch))]
    if None in ranks:
        return
    # Keras itself adds a missing last dimension if the model's input has 1 there.
    keras_adds_none = inputs and all(tensor.shape[-1:] != (1,) for tensor in inputs)
    too_low = keras_adds_none and sorted(ranks) == sorted(len(t.shape) - 1 for t in inputs)
    if too_low or all(part.shape.rank == 0 for part in parts):
        shapes = ", ".join(str(tuple(part.shape)) for part in parts)
        raise ArgumentError(
            "A tf.data.Dataset must yield batches, whose first dimension is of examples. "
            f"Received: a dataset of elements with shapes {shapes}. Call .batch(batch_size) "
            "on it."
        )


def _x_of(batch: Any) -> Any:
    return keras.utils.unpack_x_y_sample_weight(batch)[0]


def check_agreement(
    session: Session, model: Any, arguments: dict[str, Any], source: data.Source
) -> None:
    """Checks that all workers have the same arguments, model, data and versions.

    Args:
        session: The session.
        model: A built `keras.Model`.
        arguments: Values that must be equal, by name.
        source: The data.

    Raises:
        DisagreementError: A value differs. The message names it, with each worker's value.
    """
    if session.strategy.place.num_workers == 1:
        return
    local_facts = {
        "versions": f"tfdist {__version__}, keras {keras.__version__}, tensorflow "
        f"{tf.__version__}, numpy {np.__version__}, python {platform.python_version()}",
        "model": [f"{v.path} {tuple(v.shape)} {v.dtype}" for v in model.variables],
        "data": source.fingerprint(),
        **arguments,
    }
    all_facts = session.strategy.gather_objects(local_facts)
    for name in dict.fromkeys(key for facts in all_facts for key in facts):
        values = [facts.get(name) for facts in all_facts]
        if any(value != values[0] for value in values):
            detail = data.difference(source, session.strategy) if name == "data" else None
            _raise_disagreement(name, values, detail)


def _raise_disagreement(name: str, values: list[Any], detail: str | None) -> None:
    if isinstance(values[0], list):  # a model's variables: list only those that differ
        common = set.intersection(*(set(value or []) for value in values))
        values = [[line for line in value or [] if line not in common] for value in values]
    listed = "; ".join(f"worker {i}: {value}" for i, value in enumerate(values))
    remedy = {
        "data": "Give every worker the same data in the same order. Seed random generators.",
        "versions": "Install the same versions on every host.",
    }.get(name, "Start the same script with the same arguments on every worker.")
    raise DisagreementError(
        f"All workers must be given the same {name}. Received: {detail or listed}. {remedy}"
    )
