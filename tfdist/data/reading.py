"""Chooses the road for what `fit` was given."""

from __future__ import annotations

import dataclasses
import math
import os
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist._keras import undistributed
from tfdist.data.arrays import Arrays, is_arrays, is_values, kind_of_values, read_columns
from tfdist.data.augment import Augment, Augmented
from tfdist.data.batches import DatasetBatches, GeneratorBatches, PyDatasetBatches
from tfdist.data.by_class import ByClass, may_not_end
from tfdist.data.class_streams import ClassStreams
from tfdist.data.class_weight import Weigh, weigher, x_and_y
from tfdist.data.local import LocalArrays, LocalShard, bind
from tfdist.data.local_rows import exchange
from tfdist.data.source import Source, shortened
from tfdist.errors import ArgumentError
from tfdist.samplers import ByQuota, Sampler, Sequential, Uniform
from tfdist.samplers.labelled import Labelled
from tfdist.strategies.base import Strategy


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
        class_weight: Weights by class number, a rule that finds them, or None.
        augment: Changes examples at random, or None.
        shard: How rows count of which each worker has its own, or None where all have all.
        strategy: Whose workers these are.
        private: Whether even counts of classes must stay on their worker.
        copies: How often each row that was drawn comes, one behind the other.
    """

    batch_size: int | None
    steps: int | None
    sampler: Sampler
    shuffle: bool
    seed: int
    training: bool
    class_weight: Any = None
    augment: Augment | None = None
    shard: LocalShard | None = None
    strategy: Strategy | None = None
    private: bool = False
    copies: int = 1


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
    source = _read(undistributed(x), y, sample_weight, settings)
    if settings.augment is None:
        return source
    copies = settings.copies if settings.private else None
    return Augmented(source, settings.augment, settings.seed, copies)


def _read(x: Any, y: Any, sample_weight: Any, settings: Settings) -> Source:
    if settings.class_weight and sample_weight is not None:
        raise ArgumentError(
            "`class_weight` and `sample_weight` cannot be used at the same time. Multiply "
            "the weights by class yourself: sample_weight * class_weights[y]."
        )
    kind = type(x).__name__
    if is_arrays(x):
        shard, strategy = settings.shard, settings.strategy
        if shard is None or strategy is None or strategy.place.num_workers == 1:
            return _read_arrays(x, y, sample_weight, settings)
        return _read_local(x, y, sample_weight, settings, shard, strategy)
    _check_kind(x)
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
    by_class = _by_class(x, settings)
    if by_class is not None:
        return ClassStreams(
            by_class,
            settings.sampler,
            _batch_size(settings),
            settings.seed,
            settings.steps,
            _weigher(settings, by_class.targets),
        )
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
            stacklevel=2,
        )
    if isinstance(x, tf.data.Dataset):
        return DatasetBatches(
            x,
            settings.steps,
            transform=_weigher(settings, lambda: _targets_of_dataset(x, settings.steps)),
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
        )
    if settings.class_weight:
        raise ArgumentError(
            "`class_weight` cannot be used with a generator. Let it yield "
            "(x, y, sample_weight)."
        )
    return GeneratorBatches(x, settings.steps, settings.training)


def _check_kind(x: Any) -> None:
    """Refuses what yields no batches, with the likely way out."""
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
    """Tells a dict of a stream for each class."""
    return (
        isinstance(x, dict)
        and bool(x)
        and all(isinstance(part, tf.data.Dataset) for part in x.values())
    )


_UNCOUNTABLE = (
    "Classes can be counted only in data that ends. Received: a {}, and a rule as "
    "`class_weight`. Pass a dict; tfdist.imbalance.class_weights finds one from labels."
)


def _weigher(settings: Settings, targets: Callable[[], Iterable[Any]]) -> Weigh | None:
    """Makes what adds class weights to a batch; a dict's classes are not looked for."""
    if not settings.class_weight:
        return None
    return weigher(settings.class_weight, targets, must_occur=False)


def _by_class(x: Any, settings: Settings) -> ByClass | None:
    """Tells whether `x` is to be drawn from by class."""
    if isinstance(x, ByClass):
        return x
    if _is_by_name(x) or (
        isinstance(x, tf.data.Dataset) and isinstance(settings.sampler, ByQuota)
    ):
        return ByClass(x)
    return None


def _batch_size(settings: Settings) -> int:
    batch_size = 32 if settings.batch_size is None else settings.batch_size
    if not isinstance(batch_size, int | np.integer) or batch_size < 1:
        raise ArgumentError(
            "`batch_size` must be a whole number of at least 1: the examples of one update "
            f"over all replicas. Received: batch_size={batch_size!r}."
        )
    return int(batch_size)


def _dealing(settings: Settings) -> dict[str, int]:
    """Says how rows of a share are repeated and padded.

    Poisson sampling draws another number of rows each time, and TensorFlow keeps kernels for
    every one that it meets. So they are rounded up by about the standard deviation of their
    number: that makes some 8 of them, for a few percent more rows.
    """
    rounded_to = 1
    if settings.private:
        strategy = settings.strategy
        replicas = 1 if strategy is None else strategy.place.num_replicas
        share = _batch_size(settings) / replicas
        rounded_to = 2 ** max(0, round(math.log2(share) / 2))
    return {"copies": settings.copies, "rounded_to": rounded_to}


def _read_arrays(x: Any, y: Any, sample_weight: Any, settings: Settings) -> Arrays:
    batch_size = _batch_size(settings)
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
        flows=settings.training,
        **_passes(sampler, num_rows, batch_size, settings),
        **_dealing(settings),
    )


def _packed(data: tuple[Any, ...]) -> Any:
    """Gives what Keras's steps get: `x` alone is no tuple, unless it is several inputs."""
    return data[0] if len(data) == 1 and not isinstance(data[0], tuple) else data


def _passes(sampler: Sampler, num_rows: int, batch_size: int, settings: Settings) -> Any:
    """Says how many steps a pass over the rows has, and an epoch, if it is another number.

    A sampler with an order of its own has no passes that an epoch could break off.
    """
    of_sampler = sampler.steps_per_epoch(num_rows, batch_size)
    has_passes = not settings.training or isinstance(sampler, Sequential | Uniform)
    endless = settings.steps is not None and not has_passes
    return {"batches": None if endless else of_sampler, "asked_steps": settings.steps}


def _read_local(
    x: Any,
    y: Any,
    sample_weight: Any,
    settings: Settings,
    shard: LocalShard,
    strategy: Strategy,
) -> LocalArrays:
    """Reads arrays of which each worker passes what it holds."""
    batch_size = _batch_size(settings)
    data, held = read_columns(x, y, sample_weight, may_be_empty=True)
    if shard.weight_by == "workers" and y is None:
        raise ArgumentError("`weight_by='workers'` weighs losses by target. Received: y=None.")
    worker = strategy.place.worker_index
    labels = None
    if settings.training and not settings.private:
        labels = getattr(settings.sampler, "labels", None)
        if labels is None and y is not None and isinstance(data[1], tf.Tensor):
            labels = data[1].numpy()
    holdings, order = exchange(strategy, held, labels)
    num_rows, labels = sum(holdings.rows), holdings.labels()
    if settings.class_weight:
        targets = x_and_y(data)[1] if labels is None else tf.constant(labels + 0)
        data = weigher(settings.class_weight, lambda: [targets], must_occur=True)(*data)
    if shard.weight_by == "workers":
        weights = data[2] if len(data) == 3 else tf.ones(held, keras.config.floatx())
        factor = holdings.weight_of(worker)
        data = (*data[:2], tf.nest.map_structure(lambda weight: weight * factor, weights))
    sampler = bind(settings.sampler, holdings)
    order = order if isinstance(settings.sampler, Labelled) else None
    data = _packed(data)
    if settings.augment is not None and settings.augment.repeated:
        first = holdings.first_rows[worker]
        repeats = np.empty(held)
        repeats[slice(None) if order is None else order] = _repeats(sampler, num_rows)[
            first : first + held
        ]
        data = (data, tf.constant(repeats, tf.float32))
    return LocalArrays(
        data,
        sampler,
        batch_size,
        settings.seed,
        flows=settings.training,
        holdings=holdings,
        worker=worker,
        order=order,
        **_passes(sampler, num_rows, batch_size, settings),
        **_dealing(settings),
    )


def _for_augmenting(data: Any, sampler: Sampler, num_rows: int, augment: Augment) -> Any:
    """Adds what `Augmented` must know of each row; refuses what would change nothing."""
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


def _targets_of_dataset(dataset: Any, steps: int | None) -> Iterator[Any]:
    """Goes through a `tf.data.Dataset` once, for its targets."""
    if may_not_end(dataset, steps):
        raise ArgumentError(_UNCOUNTABLE.format("tf.data.Dataset without a known end"))
    for batch in dataset:
        yield x_and_y(batch if isinstance(batch, tuple) else (batch,))[1]


def _targets_of_py_dataset(dataset: Any) -> Iterator[Any]:
    if dataset.num_batches is None:
        raise ArgumentError(_UNCOUNTABLE.format("PyDataset without a length"))
    for number in range(dataset.num_batches):
        yield tf.convert_to_tensor(x_and_y(tuple(dataset[number]))[1])
