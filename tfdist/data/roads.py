"""Chooses the road for what `fit` was given."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist.data.arrays import Arrays, count_rows, is_arrays, to_tensors
from tfdist.data.batches import DatasetBatches, GeneratorBatches, PyDatasetBatches
from tfdist.data.source import Source, shortened
from tfdist.errors import ArgumentError
from tfdist.samplers import Sampler, Sequential, Uniform


@dataclass(frozen=True)
class Settings:
    """How a source is to be read.

    Attributes:
        batch_size: Examples of a full global batch, or None for 32 or what batches hold.
        steps: Steps an epoch, or None for all of the data.
        sampler: Chooses rows of arrays.
        shuffle: Whether a PyDataset's batches are shuffled.
        seed: The sampler's.
        training: Whether epochs go on where the last one stopped.
        class_weight: Weights by class number, or None.
    """

    batch_size: int | None
    steps: int | None
    sampler: Sampler
    shuffle: bool
    seed: int
    training: bool
    class_weight: dict[int, float] | None = None


def read(x: Any, y: Any, sample_weight: Any, settings: Settings) -> Source:
    """Chooses the road for an input.

    Args:
        x: Arrays, a `tf.data.Dataset`, a `keras.utils.PyDataset` or a generator.
        y: Targets, for arrays only.
        sample_weight: Weights, for arrays only.
        settings: How to read it.

    Raises:
        ArgumentError: The input cannot be read, or arguments contradict each other.
    """
    if settings.class_weight and sample_weight is not None:
        raise ArgumentError(
            "`class_weight` and `sample_weight` cannot be used at the same time. Multiply "
            "the weights by class yourself: sample_weight * class_weights[y]."
        )
    weigh = _weigher(settings.class_weight) if settings.class_weight else None
    if is_arrays(x):
        return _read_arrays(x, y, sample_weight, weigh, settings)
    kind = type(x).__name__
    for name, value in (("y", y), ("sample_weight", sample_weight)):
        if value is not None:
            raise ArgumentError(
                f"`{name}` must not be passed when `x` yields batches. Received: x of type "
                f"{kind} and {name}. Let it yield (x, y) or (x, y, sample_weight)."
            )
    if not isinstance(settings.sampler, Sequential | Uniform):
        raise ArgumentError(
            "`sampler` must not be passed when `x` yields batches: it chooses rows of arrays. "
            f"Received: x of type {kind} and a sampler of type "
            f"{type(settings.sampler).__name__}. Choose the rows where batches are made."
        )
    if settings.batch_size is not None:
        raise ArgumentError(
            "`batch_size` must not be passed when `x` yields batches. Received: x of type "
            f"{kind} and batch_size={settings.batch_size}. Set the size where they are made."
        )
    if isinstance(x, tf.data.Dataset):
        return DatasetBatches(x, settings.steps, continues=settings.training, transform=weigh)
    if isinstance(x, keras.utils.PyDataset):
        return PyDatasetBatches(
            x,
            settings.steps,
            shuffle=settings.shuffle,
            seed=settings.seed,
            transform=weigh,
        )
    if isinstance(x, types.GeneratorType):
        if weigh is not None:
            raise ArgumentError(
                "`class_weight` cannot be used with a generator. Let it yield "
                "(x, y, sample_weight)."
            )
        return GeneratorBatches(x, settings.steps)
    raise ArgumentError(
        "`x` must be arrays, a tf.data.Dataset, a keras.utils.PyDataset or a generator. "
        f"Received: x={shortened(x)} (of type {kind})."
    )


def _read_arrays(
    x: Any, y: Any, sample_weight: Any, weigh: Callable[..., Any] | None, settings: Settings
) -> Arrays:
    batch_size = 32 if settings.batch_size is None else settings.batch_size
    if not isinstance(batch_size, int | np.integer) or batch_size < 1:
        raise ArgumentError(
            "`batch_size` must be a whole number of at least 1: the examples of one update "
            f"over all replicas. Received: batch_size={batch_size!r}."
        )
    columns = {
        "x": to_tensors(x, "x"),
        "y": None if y is None else to_tensors(y, "y"),
        "sample_weight": None
        if sample_weight is None
        else to_tensors(sample_weight, "sample_weight"),
    }
    num_rows = count_rows(**columns)
    data = (columns["x"],) if y is None else (columns["x"], columns["y"])
    if sample_weight is not None:
        if y is None:
            raise ArgumentError("`sample_weight` must come with `y`. Received: y=None.")
        data = (*data, columns["sample_weight"])
    if weigh is not None:
        data = weigh(*data)
    sampler = settings.sampler.bind(columns["y"], num_rows)
    steps = settings.steps or sampler.steps_per_epoch(num_rows, int(batch_size))
    if not settings.training:
        steps = min(steps, sampler.steps_per_epoch(num_rows, int(batch_size)))
    return Arrays(data, sampler, int(batch_size), settings.seed, steps, settings.training)


def _weigher(class_weight: dict[int, float]) -> Callable[..., Any]:
    """Makes a function that adds class weights to `(x, y)`."""
    table = np.ones(max(class_weight) + 1, np.float32)
    for label, weight in class_weight.items():
        table[int(label)] = weight

    def weigh(*batch: Any) -> Any:
        x, y, given = keras.utils.unpack_x_y_sample_weight(
            batch[0] if len(batch) == 1 else batch
        )
        if given is not None or y is None or tf.nest.is_nested(y):
            raise ArgumentError(
                "`class_weight` needs one target for each example, and no sample weights. "
                f"Received: y={shortened(y)}, sample_weight={shortened(given)}."
            )
        if y.shape.rank >= 2 and y.shape[-1] != 1:
            labels = tf.argmax(y, -1, tf.int32)
        else:
            labels = tf.squeeze(y, -1) if y.shape.rank >= 2 else y
            labels = tf.cast(labels if labels.dtype.is_integer else tf.round(labels), tf.int32)
        # Classes that the dict does not name weigh 1, as in Keras.
        inside = tf.minimum(labels, len(table) - 1)
        return x, y, tf.where(labels < len(table), tf.gather(table, inside), 1.0)

    return weigh
