"""What a private `fit` will do with its data: its steps, who takes part, and how often."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tfdist.data import leaves
from tfdist.data.arrays import Arrays
from tfdist.data.batches import Batches, PyDatasetBatches
from tfdist.data.datasets import DatasetBatches
from tfdist.data.separation import SeparationCheck, check_places
from tfdist.data.source import Source
from tfdist.errors import ArgumentError
from tfdist.privacy.accounting.ledger import Phase
from tfdist.privacy.dpftrl import DPFTRL
from tfdist.privacy.sampling.poisson import Accounted
from tfdist.privacy.settings import DPSGD
from tfdist.strategies.base import Place


class Plan(NamedTuple):
    """What is planned.

    Attributes:
        steps: All that are planned.
        phase: One step, without noise.
        divisor: Of the sum of a step's gradients: `batch_size`, also where the data have fewer
            examples. Divided by their number, the noise would tell it.
        expected_units: What is clipped by itself in a step on average: examples or users.
    """

    steps: int
    phase: Phase
    divisor: float
    expected_units: float


def plan(privacy: DPSGD, source: Source, epochs: int) -> Plan:
    """Finds out what is planned.

    Args:
        privacy: The settings.
        source: The data.
        epochs: To be made.

    Raises:
        ArgumentError: It cannot be known, or would not be private.
    """
    if isinstance(privacy, DPFTRL):
        return _in_turn(privacy, source, max(0, epochs))
    arrays = source.drawn_from
    assert isinstance(arrays, Arrays)
    sampler = arrays.sampler
    assert isinstance(sampler, Accounted)
    batch_size, rows = arrays.batch_size, arrays.num_rows
    phase = sampler.phase(num_rows=rows, batch_size=batch_size, steps=1, noise_multiplier=0.0)
    if not phase.truncates:
        phase = dataclasses.replace(phase, capacity=None)
    return Plan(
        (arrays.steps or 0) * max(0, epochs),
        phase,
        float(batch_size),
        sampler.expected_units(rows, batch_size),
    )


def watch(source: Source, separation: int | None, steps_made: Callable[[], int]) -> Any:
    """Lets the data be looked at while it comes, where its order is a user's promise.

    Args:
        source: The data.
        separation: As in `Phase`.
        steps_made: As in `SeparationCheck`.

    Returns:
        What looks at it, or None.
    """
    inner = source.drawn_from
    if not isinstance(inner, Batches):
        return None
    inner.watch = SeparationCheck(separation, steps_made)
    return inner.watch


def in_its_turn(model: Any, source: Source) -> dict[str, Any]:
    """Describes what an example contributes and when, where its part in earlier steps counts.

    Args:
        model: A compiled `keras.Model`.
        source: The data.

    Returns:
        Plain data by name. A checkpoint's folder holds it, which is not to be released.
    """
    inner = source.drawn_from
    found = {"loss": _text(model.loss), "optimizer": _text_of_optimizer(model.optimizer)}
    if type(inner) is Arrays:
        found["values"] = _digest(inner.data)
    elif not isinstance(inner, Arrays):
        found["values"] = _digest(next(iter(inner.shares(Place()))).data)
    return found


def _text(value: Any) -> str:
    try:
        return json.dumps(keras.saving.serialize_keras_object(value), sort_keys=True)
    except (TypeError, ValueError):
        return getattr(value, "__qualname__", type(value).__qualname__)


def _text_of_optimizer(optimizer: Any) -> str:
    config = dict(optimizer.get_config())
    for changing in ("name", "learning_rate"):  # callbacks set the rate
        config.pop(changing, None)
    return f"{type(optimizer).__qualname__} {json.dumps(config, sort_keys=True, default=repr)}"


def _digest(structure: Any) -> str:
    digest = hashlib.sha256()
    for part in leaves.components(structure):
        array = np.ascontiguousarray(part.numpy())
        if array.dtype == object:  # texts
            digest.update(repr(array.tolist()).encode())
        else:
            digest.update(array.view(np.uint8).data)
    return digest.hexdigest()


def _check_separation(
    separation: int | None, source: Source, batch_size: int, epochs: int
) -> None:
    """Refuses a promise that is missing, or that the data cannot keep."""
    repeated = source.repetitions() if isinstance(source, DatasetBatches) else []
    endless = isinstance(source, PyDatasetBatches) and source.batches is None
    if separation is None and (epochs > 1 or repeated or endless):
        what = "data that repeats itself" if repeated or endless else f"{epochs} epochs"
        raise ArgumentError(
            "`min_separation` must be given where batches come more than once: how many steps "
            f"lie between two that an example takes part in. Received: {what} and "
            "min_separation=None. Without reshuffling it is the number of batches."
        )
    if separation is None:
        return
    # Of rows that are repeated, each comes after so many batches, or one more.
    known = [count // batch_size if of_rows else count for count, of_rows in repeated]
    known += [source.batches] if source.batches is not None else []
    most = min((count for count in known if count >= 0), default=None)
    if most is not None and separation > max(1, most):
        raise ArgumentError(
            "`min_separation` must not be above the number of batches in which each example "
            f"comes once. Received: min_separation={separation!r} and {most} batches."
        )


def _in_turn(privacy: DPFTRL, source: Source, epochs: int) -> Plan:
    inner = source.drawn_from
    if source.steps is None:
        raise ArgumentError(
            "The steps of an epoch must be known in private training. Received: data of "
            "unknown length. Pass steps_per_epoch."
        )
    separation, rows = privacy.min_separation, None
    if isinstance(inner, Arrays):
        if separation is not None:
            raise ArgumentError(
                "`min_separation` must be None for arrays, whose order is known. Received: "
                f"min_separation={separation!r}."
            )
        rows, batch_size = inner.num_rows, inner.batch_size
        separation = inner.sampler.steps_per_epoch(rows, batch_size)
    else:
        if isinstance(inner, DatasetBatches):
            check_places(inner.user_dataset, separation is not None)
        share = next(iter(inner.shares(Place())))
        batch_size = int(tf.nest.flatten(share.data)[0].shape[0])
        _check_separation(separation, inner, batch_size, epochs)
    phase = Phase(1.0, 0.0, 1, None, rows, bands=privacy.bands, separation=separation)
    return Plan(source.steps * epochs, phase, batch_size, batch_size)
