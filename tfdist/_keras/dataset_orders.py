"""Finds shuffles of a `tf.data.Dataset` by which what comes again comes in another order."""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

from tfdist._keras.dataset_sources import SOURCES, Sources
from tfdist._keras.datasets import serialized

# Names of dataset classes.
_SHUFFLES = frozenset({"_GlobalShuffleDataset", "_ShuffleAndRepeatDataset", "_ShuffleDataset"})
_REPEATS = frozenset({"_RepeatDataset", "_ShuffleAndRepeatDataset"})
_JOINS = frozenset({"_ConcatenateDataset", "_DirectedInterleaveDataset", "_ZipDataset"})
_KEEP = "Pass shuffle(..., reshuffle_each_iteration=False)."
_BEFORE = "Shuffle before `repeat`, with reshuffle_each_iteration=False."
_ONCE = "Shuffle once before training, and train on the saved result (Dataset.save)."


class Reordering(NamedTuple):
    """An operation by which what comes again comes in another order.

    Attributes:
        operation: The operation, as a part of a sentence.
        in_one_batch: Whether an example may also come twice in a batch.
        remedy: What keeps the order, a sentence.
    """

    operation: str
    in_one_batch: bool
    remedy: str


class _Place(NamedTuple):
    """What later operations do with a dataset.

    Attributes:
        comes_again: Whether it is drawn more than once.
        crosses: Whether a batch may have rows of two of these times.
        batched: Whether a later operation makes batches of its elements.
    """

    comes_again: bool
    crosses: bool = False
    batched: bool = False


def reordering(dataset: Any, comes_again: bool) -> Reordering | None:
    """Finds an operation by which an example that comes again may come after any distance.

    A shuffle before a `cache` counts: a cache that was not read to its end is made anew. Python
    code, which may shuffle too, is not examined.

    Args:
        dataset: A `tf.data.Dataset` of batches.
        comes_again: Whether the dataset is drawn more than once.

    Returns:
        The operation that does most, or None.
    """
    reorderings: list[Reordering] = []
    _look(dataset, _Place(comes_again), reorderings)
    if any(_shuffles(earlier) for earlier in _upstream(dataset)) and _has_source_twice(dataset):
        in_one_batch = _joins_in_a_batch(dataset, batched=False)
        operation = "a shuffle, and one source in several places"
        reorderings.append(Reordering(operation, in_one_batch, _ONCE))
    return max(reorderings, key=lambda r: r.in_one_batch, default=None)


def _look(dataset: Any, place: _Place, reorderings: list[Reordering]) -> None:
    """Adds the reorderings of a dataset and all its inputs."""
    kind = type(dataset).__name__
    if kind in _REPEATS and int(dataset._count) not in (0, 1):
        place = place._replace(comes_again=True, crosses=place.crosses or place.batched)
    if _reshuffles(dataset) and place.comes_again:
        operation = "a shuffle that is drawn more than once, each time in another order"
        reorderings.append(Reordering(operation, place.crosses, _KEEP))
    # The buffer of such a shuffle has elements of two passes. So an example may come twice in a
    # row.
    if kind in _SHUFFLES and any(_repeats(earlier) for earlier in _inputs(dataset)):
        reorderings.append(Reordering("a shuffle after a repeat", place.batched, _BEFORE))
    place = place._replace(batched=place.batched or "Batch" in kind)
    for source in _inputs(dataset):
        _look(source, place, reorderings)


def _inputs(dataset: Any) -> list[Any]:
    """Lists the inputs of a dataset, also one of files' names."""
    names = vars(dataset).get("_filenames")
    return [*dataset._inputs(), *([names] if isinstance(names, tf.data.Dataset) else [])]


def _upstream(dataset: Any) -> list[Any]:
    return [
        dataset,
        *(upstream for source in _inputs(dataset) for upstream in _upstream(source)),
    ]


def _repeats(dataset: Any) -> bool:
    return any(
        type(upstream).__name__ in _REPEATS and int(upstream._count) not in (0, 1)
        for upstream in _upstream(dataset)
    )


def _reshuffles(dataset: Any) -> bool:
    """Returns whether an operation has another order in each iteration."""
    kind = type(dataset).__name__
    if kind in ("_GlobalShuffleDataset", "_ShuffleDataset"):
        return bool(dataset._reshuffle_each_iteration)
    if kind == "_RandomDataset":  # choices of `sample_from_datasets`
        return bool(dataset._rerandomize)
    return _shuffles(dataset)


def _shuffles(dataset: Any) -> bool:
    kind = type(dataset).__name__
    if kind == "_VariantDataset":  # made by `choose_from_datasets`
        try:
            return any("Shuffle" in node.op for node in serialized(dataset).node)
        except tf.errors.OpError:
            return True
    if kind == "_LoadDataset":
        operations = dataset._reader_func.function.graph.get_operations()
        return any("Shuffle" in op.type for op in operations)
    return kind in _SHUFFLES


def _has_source_twice(dataset: Any) -> bool:
    """Returns whether one source, a part of it or one file is in several places."""
    sources = Sources()
    return any(
        sources.has_rows_of(source) or sources.has_files_of(source, read=True)
        for source in _sources_of(dataset)
    )


def _sources_of(dataset: Any) -> list[Any]:
    if type(dataset).__name__ in SOURCES:
        return [dataset]
    return [source for earlier in dataset._inputs() for source in _sources_of(earlier)]


def _joins_in_a_batch(dataset: Any, batched: bool) -> bool:
    """Returns whether a batch may have elements of several datasets."""
    kind = type(dataset).__name__
    if kind in _JOINS and (batched or kind == "_ZipDataset"):
        return True
    batched = batched or "Batch" in kind
    return any(_joins_in_a_batch(source, batched) for source in _inputs(dataset))
