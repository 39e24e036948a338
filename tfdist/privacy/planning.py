"""The plan of a private `fit`: its steps, and how often each example takes part."""

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
from tfdist.data.epochs import count_steps
from tfdist.data.separation import SeparationCheck
from tfdist.data.source import Source
from tfdist.errors import ArgumentError
from tfdist.privacy.accounting.ledger import Phase
from tfdist.privacy.dpftrl import DPFTRL
from tfdist.privacy.sampling.poisson import Accounted
from tfdist.privacy.settings import DPSGD
from tfdist.strategies.base import Place


class StepPlan(NamedTuple):
    """The plan of a private `fit`.

    Attributes:
        steps: The number of planned steps, in whole executions as they are made.
        phase: One step, without noise.
        divisor: The divisor of the sum of a step's gradients. It is `batch_size`, even if the
            data have fewer examples: their number would otherwise show in the noise.
        expected_units: The mean number of examples, or of users, in a step.
    """

    steps: int
    phase: Phase
    divisor: float
    expected_units: float


def plan(privacy: DPSGD, source: Source, epochs: int, at_once: int) -> StepPlan:
    """Plans the steps of a private `fit`.

    Args:
        privacy: The settings.
        source: The data.
        epochs: The number of epochs.
        at_once: The `steps_per_execution` of the model.

    Raises:
        ArgumentError: The number of steps is unknown, or the plan would not be private.
    """
    # A training that is complete already plans no steps.
    epochs = max(0, epochs)
    steps = count_steps(source.requested_steps, source.batches, epochs, at_once)
    if isinstance(privacy, DPFTRL):
        return _in_turn(privacy, source, epochs, steps)
    arrays = source.drawn_from
    assert isinstance(arrays, Arrays)
    sampler = arrays.sampler
    assert isinstance(sampler, Accounted)
    batch_size, rows = arrays.batch_size, arrays.num_rows
    phase = sampler.phase(num_rows=rows, batch_size=batch_size, steps=1, noise_multiplier=0.0)
    if not phase.truncates:
        phase = dataclasses.replace(phase, capacity=None)
    return StepPlan(
        steps,
        phase,
        float(batch_size),
        sampler.expected_units(rows, batch_size),
    )


def watch(source: Source, separation: int | None, steps_made: Callable[[], int]) -> Any:
    """Checks batches while they are read, if the user promises their order.

    Args:
        source: The data.
        separation: As in `Phase`.
        steps_made: As in `SeparationCheck`.

    Returns:
        The check, or None for arrays, whose order is known.
    """
    batches = source.drawn_from
    if not isinstance(batches, Batches):
        return None
    batches.watch = SeparationCheck(separation, steps_made)
    return batches.watch


def in_its_turn(model: Any, source: Source) -> dict[str, Any]:
    """Describes the contributions of examples, for a training without sampling.

    Such a training continues only with the same loss, optimizer and data: an example's
    contribution to earlier steps is part of the mechanism of later ones.

    Args:
        model: A compiled `keras.Model`.
        source: The data.

    Returns:
        Plain data by name. It is saved in the checkpoint's folder, which must not be released.
    """
    rows = source.drawn_from
    facts = {"loss": _text(model.loss), "optimizer": _text_of_optimizer(model.optimizer)}
    if type(rows) is Arrays:
        facts["values"] = _digest(rows.data)
    elif not isinstance(rows, Arrays):
        facts["values"] = _digest(next(iter(rows.shares(Place()))).data)
    return facts


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
    """Refuses a `min_separation` that is missing, or larger than the data allows."""
    repeated = source.repetitions() if isinstance(source, DatasetBatches) else []
    endless = isinstance(source, PyDatasetBatches) and source.batches is None
    if separation is None and (epochs > 1 or repeated or endless):
        received = "data that repeats itself" if repeated or endless else f"{epochs} epochs"
        raise ArgumentError(
            "`min_separation` must be given if a batch comes more than once: it is the least "
            f"number of steps between two that use an example. Received: {received} and "
            "min_separation=None. Without reshuffling, pass the number of batches."
        )
    if separation is None:
        return
    # A row of repeated rows comes again after `count // batch_size` batches, or one more.
    distances = [count // batch_size if of_rows else count for count, of_rows in repeated]
    distances += [source.batches] if source.batches is not None else []
    most_batches = min((count for count in distances if count >= 0), default=None)
    if most_batches is not None and separation > max(1, most_batches):
        raise ArgumentError(
            "`min_separation` must not be above the number of batches in which each example "
            f"comes once. Received: min_separation={separation!r} and {most_batches} batches. "
            "Pass a smaller number."
        )


def _in_turn(privacy: DPFTRL, source: Source, epochs: int, steps: int) -> StepPlan:
    """Plans steps without sampling, in which each example takes part once an epoch."""
    inner = source.drawn_from
    if source.steps is None:
        raise ArgumentError(
            "The steps of an epoch must be known in private training. Received: "
            "steps_per_epoch=None, with data of unknown length. Pass steps_per_epoch."
        )
    separation, rows = privacy.min_separation, None
    if isinstance(inner, Arrays):
        if separation is not None:
            raise ArgumentError(
                "`min_separation` must be None for arrays, whose order is known. Received: "
                f"min_separation={separation!r}. Leave it out."
            )
        rows, batch_size = inner.num_rows, inner.batch_size
        separation = inner.sampler.steps_per_epoch(rows, batch_size)
    else:
        assert isinstance(inner, Batches)  # `validation.check_data` refuses all others
        inner.check_order(separation, comes_again=epochs > 1)
        first_batch = next(iter(inner.shares(Place())))
        batch_size = int(tf.nest.flatten(first_batch.data)[0].shape[0]) // inner.copies
        _check_separation(separation, inner, batch_size, epochs)
    phase = Phase(1.0, 0.0, 1, None, rows, bands=privacy.bands, separation=separation)
    return StepPlan(steps, phase, batch_size, batch_size)
