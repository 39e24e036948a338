"""What a private `fit` will do with its data: its steps, who takes part, and how often."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import tensorflow as tf

from tfdist.data.arrays import Arrays
from tfdist.data.source import Source
from tfdist.errors import ArgumentError
from tfdist.privacy.in_turn import DPFTRL
from tfdist.privacy.ledger import Phase
from tfdist.privacy.poisson import Accounted
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
        if separation is None and epochs > 1:
            raise ArgumentError(
                "`min_separation` must be given where batches come more than once: how many "
                "steps lie between two that an example takes part in. Received: "
                f"{epochs} epochs and min_separation=None. Without reshuffling it is the "
                "number of batches."
            )
        share = next(iter(source.shares(Place())))
        batch_size = int(tf.nest.flatten(share.data)[0].shape[0])
    phase = Phase(1.0, 0.0, 1, None, rows, bands=privacy.bands, separation=separation)
    return Plan(source.steps * epochs, phase, batch_size, batch_size)
