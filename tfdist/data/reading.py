"""Chooses the data source for the arguments of `fit`."""

from __future__ import annotations

import os
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import tensorflow as tf

from tfdist._keras import undistributed
from tfdist.data.augmented import Augmented
from tfdist.data.batches import GeneratorBatches, PyDatasetBatches
from tfdist.data.by_class import ByClass, may_not_end
from tfdist.data.class_streams import ClassStreams
from tfdist.data.class_weight import Weigh, weigher, x_and_y
from tfdist.data.columns import is_arrays, is_values, kind_of_values
from tfdist.data.datasets import DatasetBatches
from tfdist.data.reading_arrays import read_arrays, read_local
from tfdist.data.settings import SourceSettings, checked_batch_size
from tfdist.data.source import Source, shortened
from tfdist.errors import ArgumentError
from tfdist.samplers import ByQuota, Sequential, Uniform


def read(x: Any, y: Any, sample_weight: Any, settings: SourceSettings) -> Source:
    """Makes the data source for an input.

    Args:
        x: Arrays, a `tf.data.Dataset`, a `keras.utils.PyDataset` or a generator.
        y: Targets, for arrays only.
        sample_weight: Weights, for arrays only.
        settings: The settings of the source.

    Raises:
        ArgumentError: The input cannot be read, or arguments contradict each other.
    """
    source = _read(undistributed(x), y, sample_weight, settings)
    if settings.augment is None:
        return source
    copies = settings.copies if settings.private else None
    return Augmented(source, settings.augment, settings.seed, copies)


def _read(x: Any, y: Any, sample_weight: Any, settings: SourceSettings) -> Source:
    if settings.class_weight and sample_weight is not None:
        raise ArgumentError(
            "`class_weight` and `sample_weight` cannot be used at the same time. Multiply "
            "the weights by class yourself: sample_weight * class_weights[y]."
        )
    kind = type(x).__name__
    if is_arrays(x):
        shard, strategy = settings.shard, settings.strategy
        if shard is None or strategy is None or strategy.place.num_workers == 1:
            return read_arrays(x, y, sample_weight, settings)
        return read_local(x, y, sample_weight, settings, shard, strategy)
    _check_kind(x)
    _check_arguments(kind, y, sample_weight, settings)
    by_class = _by_class(x, settings)
    if by_class is not None:
        return ClassStreams(
            by_class,
            settings.sampler,
            checked_batch_size(settings),
            settings.seed,
            settings.steps,
            _weigher(settings, by_class.targets),
        )
    _check_batching(kind, settings)
    if isinstance(x, tf.data.Dataset):
        return DatasetBatches(
            x,
            settings.steps,
            transform=_weigher(settings, lambda: _targets_of_dataset(x, settings.steps)),
            copies=settings.copies,
            several_workers=settings.strategy is not None
            and settings.strategy.place.num_workers > 1,
        )
    if isinstance(x, keras.utils.PyDataset):
        return PyDatasetBatches(
            x,
            settings.steps,
            shuffle=settings.shuffle,
            seed=settings.seed,
            transform=_weigher(settings, lambda: _targets_of_py_dataset(x)),
            copies=settings.copies,
        )
    if settings.class_weight:
        raise ArgumentError(
            "`class_weight` cannot be used with a generator. Let it yield "
            "(x, y, sample_weight)."
        )
    return GeneratorBatches(x, settings.steps, settings.training)


def _check_arguments(kind: str, y: Any, sample_weight: Any, settings: SourceSettings) -> None:
    """Refuses arguments that only arrays can have, for an input of another kind."""
    if settings.shard is not None:
        raise ArgumentError(
            "`shard='local'` needs arrays, whose rows can be counted. Received: x of type "
            f"{kind}. Pass arrays, or leave `shard` out and give every worker the same data."
        )
    if settings.augment is not None and settings.augment.repeated:
        raise ArgumentError(
            "`repeated` of `Augment` needs arrays, of which a sampler says how often each "
            f"example comes. Received: x of type {kind}. Name the classes: classes=[...]."
        )
    for name, value in (("y", y), ("sample_weight", sample_weight)):
        if value is not None:
            raise ArgumentError(
                f"`{name}` must not be passed when `x` yields batches. Received: x of type "
                f"{kind} and {name}. Let it yield (x, y) or (x, y, sample_weight)."
            )


def _check_batching(kind: str, settings: SourceSettings) -> None:
    """Refuses a sampler, and ignores a batch size, for an input that yields batches."""
    if not isinstance(settings.sampler, Sequential | Uniform):
        raise ArgumentError(
            "`sampler` must not be passed when `x` yields batches: it chooses rows of arrays. "
            f"Received: x of type {kind} and a sampler of type "
            f"{type(settings.sampler).__name__}. Choose the rows where batches are made."
        )
    if settings.batch_size is not None and settings.training:
        warnings.warn(
            f"batch_size={settings.batch_size} is ignored, as Keras does: x of type {kind} "
            "yields batches. Set the size where they are made.",
            stacklevel=3,
        )


def _check_kind(x: Any) -> None:
    """Refuses an input that yields no batches, and names the likely remedy."""
    streams = tf.data.Dataset | keras.utils.PyDataset | types.GeneratorType | ByClass
    if isinstance(x, streams) or _is_by_name(x):
        return
    remedy = ""
    if is_values(x):
        remedy = f", a {type(x).__name__} of {kind_of_values(x)}. Pass np.array(x)."
    elif isinstance(x, str | bytes | os.PathLike):
        remedy = (
            ", a path: files are not read. Load it first: np.load, pandas.read_csv, tf.data."
        )
    elif isinstance(x, dict | list | tuple):
        odd = next((leaf for leaf in tf.nest.flatten(x) if not is_arrays(leaf)), None)
        remedy = f", which holds {shortened(odd)} (of type {type(odd).__name__})."
    raise ArgumentError(
        "`x` must be arrays, a tf.data.Dataset, a keras.utils.PyDataset or a generator. "
        f"Received: x={shortened(x)}" + (remedy or f" (of type {type(x).__name__}).")
    )


def _is_by_name(x: Any) -> bool:
    """Returns whether an input is a dict with a dataset for each class."""
    return (
        isinstance(x, dict)
        and bool(x)
        and all(isinstance(part, tf.data.Dataset) for part in x.values())
    )


_UNCOUNTABLE = (
    "Classes can be counted only in data that ends. Received: a {}, and a rule as "
    "`class_weight`. Pass a dict; tfdist.imbalance.class_weights finds one from labels."
)


def _weigher(settings: SourceSettings, targets: Callable[[], Iterable[Any]]) -> Weigh | None:
    """Makes the function that adds class weights; classes of a dict need not occur."""
    if not settings.class_weight:
        return None
    return weigher(settings.class_weight, targets, must_occur=False)


def _by_class(x: Any, settings: SourceSettings) -> ByClass | None:
    """Returns a `ByClass` if the sampler draws from `x` by class, otherwise None."""
    if isinstance(x, ByClass):
        return x
    if _is_by_name(x) or (
        isinstance(x, tf.data.Dataset) and isinstance(settings.sampler, ByQuota)
    ):
        return ByClass(x)
    return None


def _targets_of_dataset(dataset: Any, steps: int | None) -> Iterator[Any]:
    """Yields the targets of a `tf.data.Dataset`, which is read once."""
    if may_not_end(dataset, steps):
        raise ArgumentError(_UNCOUNTABLE.format("tf.data.Dataset without a known end"))
    for batch in dataset:
        yield x_and_y(batch if isinstance(batch, tuple) else (batch,))[1]


def _targets_of_py_dataset(dataset: Any) -> Iterator[Any]:
    if dataset.num_batches is None:
        raise ArgumentError(_UNCOUNTABLE.format("PyDataset without a length"))
    for number in range(dataset.num_batches):
        yield tf.convert_to_tensor(x_and_y(tuple(dataset[number]))[1])
