"""Reads arrays, and tells the sampler and the augmentation about their rows."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist.data.arrays import Arrays
from tfdist.data.augment import Augment
from tfdist.data.class_weight import weigher, x_and_y
from tfdist.data.columns import read_columns
from tfdist.data.local import LocalArrays, LocalShard, bind
from tfdist.data.local_rows import exchange
from tfdist.data.settings import SourceSettings, checked_batch_size
from tfdist.errors import ArgumentError
from tfdist.samplers import Sampler, Sequential, Uniform
from tfdist.samplers.labelled import Labelled
from tfdist.strategies.base import Strategy


def _padding(settings: SourceSettings) -> dict[str, int]:
    """Returns how rows of a share are copied and padded.

    Poisson sampling draws another number of rows each time, and TensorFlow keeps kernels for
    every number that it meets. So the number is rounded up to a multiple of about its standard
    deviation. That leaves about 8 different numbers, for a few percent more rows.
    """
    rows_multiple = 1
    if settings.private:
        strategy = settings.strategy
        shares = 1 if strategy is None else strategy.place.num_shares
        share = checked_batch_size(settings) / shares
        rows_multiple = 2 ** max(0, round(math.log2(share) / 2))
    return {"copies": settings.copies, "rows_multiple": rows_multiple}


def read_arrays(x: Any, y: Any, sample_weight: Any, settings: SourceSettings) -> Arrays:
    """Reads arrays that every worker has.

    Args:
        x: Arrays.
        y: Targets, or None.
        sample_weight: Weights, or None.
        settings: The settings of the source.
    """
    batch_size = checked_batch_size(settings)
    data, num_rows = read_columns(x, y, sample_weight)
    if settings.class_weight:
        _, targets = x_and_y(data)
        weigh = weigher(settings.class_weight, lambda: [targets], must_occur=True)
        data = weigh(*data)
    sampler = settings.sampler.bind(data[1] if y is not None else None, num_rows)
    data = _packed(data)
    if settings.augment is not None:
        data = _for_augmenting(data, sampler, num_rows, settings.augment)
    return Arrays(
        data,
        sampler,
        batch_size,
        settings.seed,
        spans_passes=settings.training,
        **_passes(sampler, num_rows, batch_size, settings),
        **_padding(settings),
    )


def _packed(data: tuple[Any, ...]) -> Any:
    """Returns the batch of Keras's steps: a single `x` is not put into a tuple."""
    return data[0] if len(data) == 1 and not isinstance(data[0], tuple) else data


def _passes(sampler: Sampler, num_rows: int, batch_size: int, settings: SourceSettings) -> Any:
    """Returns the steps of a pass over the rows, and the user's steps an epoch.

    A sampler with its own order has no passes that the end of an epoch could interrupt.
    """
    of_sampler = sampler.steps_per_epoch(num_rows, batch_size)
    has_passes = not settings.training or isinstance(sampler, Sequential | Uniform)
    endless = settings.steps is not None and not has_passes
    return {"batches": None if endless else of_sampler, "requested_steps": settings.steps}


def read_local(
    x: Any,
    y: Any,
    sample_weight: Any,
    settings: SourceSettings,
    shard: LocalShard,
    strategy: Strategy,
) -> LocalArrays:
    """Reads arrays of which each worker passes its own rows.

    Args:
        x: Arrays.
        y: Targets, or None.
        sample_weight: Weights, or None.
        settings: The settings of the source.
        shard: How these rows count.
        strategy: The strategy of the workers.
    """
    batch_size = checked_batch_size(settings)
    data, num_local_rows = read_columns(x, y, sample_weight, may_be_empty=True)
    if shard.weight_by == "workers" and y is None:
        raise ArgumentError("`weight_by='workers'` weighs losses by target. Received: y=None.")
    if shard.weight_by == "workers" and settings.private:
        raise ArgumentError(
            "Private training must weigh examples by themselves: with `weight_by='workers'`, "
            "the weight of one follows from how many others its worker has. Received: "
            "LocalShard(weight_by='workers') with `privacy`. Leave one of them out."
        )
    worker = strategy.place.worker_index
    labels = None
    if settings.training and not settings.private:
        labels = getattr(settings.sampler, "labels", None)
        if labels is None and y is not None and isinstance(data[1], tf.Tensor):
            labels = data[1].numpy()
    holdings, order = exchange(strategy, num_local_rows, labels)
    num_rows, labels = sum(holdings.rows), holdings.labels()
    if settings.class_weight:
        targets = x_and_y(data)[1] if labels is None else tf.constant(labels + 0)
        data = weigher(settings.class_weight, lambda: [targets], must_occur=True)(*data)
    if shard.weight_by == "workers":
        weights = data[2] if len(data) == 3 else tf.ones(num_local_rows, keras.config.floatx())
        factor = holdings.weight_of(worker)
        data = (*data[:2], tf.nest.map_structure(lambda weight: weight * factor, weights))
    sampler = bind(settings.sampler, holdings)
    order = order if isinstance(settings.sampler, Labelled) else None
    data = _packed(data)
    if settings.augment is not None and settings.augment.repeated:
        first = holdings.first_rows[worker]
        repeats = np.empty(num_local_rows)
        repeats[slice(None) if order is None else order] = _repeats(sampler, num_rows)[
            first : first + num_local_rows
        ]
        data = (data, tf.constant(repeats, tf.float32))
    return LocalArrays(
        data,
        sampler,
        batch_size,
        settings.seed,
        spans_passes=settings.training,
        holdings=holdings,
        worker=worker,
        order=order,
        **_passes(sampler, num_rows, batch_size, settings),
        **_padding(settings),
    )


def _for_augmenting(data: Any, sampler: Sampler, num_rows: int, augment: Augment) -> Any:
    """Adds the repeats of each row for `Augmented`; refuses an augmentation without effect."""
    _, y, _ = keras.utils.unpack_x_y_sample_weight(data)
    if augment.classes is not None and y is not None:
        augment.check(y)
        absent = [c for c in augment.classes if not np.any(_only(augment, c).chosen(y))]
        if absent:
            raise ArgumentError(
                "Each of `classes` must occur in `y`. Received: "
                f"classes={augment.classes!r}, of which {absent} never do. Leave them out."
            )
    if not augment.repeated:
        return data
    return data, tf.constant(_repeats(sampler, num_rows), tf.float32)


def _repeats(sampler: Sampler, num_rows: int) -> Any:
    repeats = sampler.repeats(num_rows)
    if repeats is None or not (repeats > 1).any():
        raise ArgumentError(
            "`repeated` of `Augment` needs a sampler that repeats examples and says how often. "
            f"Received: a sampler of type {type(sampler).__name__}."
        )
    return repeats


def _only(augment: Augment, label: Any) -> Augment:
    return dataclasses.replace(augment, classes=[label])
