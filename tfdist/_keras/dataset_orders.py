"""Finds shuffles of a `tf.data.Dataset` by which what comes again comes in another order."""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

from tfdist._keras.dataset_sources import SOURCES, Sources
from tfdist._keras.datasets import written

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
    found: list[Reordering] = []
    _look(dataset, _Place(comes_again), found)
    if any(_shuffles(one) for one in _upstream(dataset)) and _has_source_twice(dataset):
        in_one_batch = _joins_in_a_batch(dataset, batched=False)
        operation = "a shuffle, and one source in several places"
        found.append(Reordering(operation, in_one_batch, _ONCE))
    return max(found, key=lambda one: one.in_one_batch, default=None)


def _look(one: Any, place: _Place, found: list[Reordering]) -> None:
    """Adds the reorderings of a dataset and all its inputs."""
    kind = type(one).__name__
    if kind in _REPEATS and int(one._count) not in (0, 1):
        place = place._replace(comes_again=True, crosses=place.crosses or place.batched)
    if _reshuffles(one) and place.comes_again:
        operation = "a shuffle that is drawn more than once, each time in another order"
        found.append(Reordering(operation, place.crosses, _KEEP))
    if kind in _SHUFFLES and any(_repeats(earlier) for earlier in _inputs(one)):
        found.append(Reordering("a shuffle after a repeat", place.batched, _BEFORE))
    place = place._replace(batched=place.batched or "Batch" in kind)
    for source in _inputs(one):
        _look(source, place, found)


def _inputs(one: Any) -> list[Any]:
    """Lists the inputs of a dataset, also one of files' names."""
    names = vars(one).get("_filenames")
    return [*one._inputs(), *([names] if isinstance(names, tf.data.Dataset) else [])]


def _upstream(one: Any) -> list[Any]:
    return [one, *(upstream for source in _inputs(one) for upstream in _upstream(source))]


def _repeats(one: Any) -> bool:
    return any(
        type(upstream).__name__ in _REPEATS and int(upstream._count) not in (0, 1)
        for upstream in _upstream(one)
    )


def _reshuffles(one: Any) -> bool:
    """Returns whether an operation has another order in each iteration."""
    kind = type(one).__name__
    if kind in ("_GlobalShuffleDataset", "_ShuffleDataset"):
        return bool(one._reshuffle_each_iteration)
    if kind == "_RandomDataset":  # choices of `sample_from_datasets`
        return bool(one._rerandomize)
    return _shuffles(one)


def _shuffles(one: Any) -> bool:
    kind = type(one).__name__
    if kind == "_VariantDataset":  # made by `choose_from_datasets`
        try:
            return any("Shuffle" in node.op for node in written(one).node)
        except tf.errors.OpError:
            return True
    if kind == "_LoadDataset":
        operations = one._reader_func.function.graph.get_operations()
        return any("Shuffle" in op.type for op in operations)
    return kind in _SHUFFLES


def _has_source_twice(dataset: Any) -> bool:
    """Returns whether one source, a part of it or one file is in several places."""
    sources = Sources()
    return any(
        sources.has_rows_of(one) or sources.has_files_of(one, read=True)
        for one in _sources_of(dataset)
    )


def _sources_of(one: Any) -> list[Any]:
    if type(one).__name__ in SOURCES:
        return [one]
    return [source for earlier in one._inputs() for source in _sources_of(earlier)]


def _joins_in_a_batch(one: Any, batched: bool) -> bool:
    """Returns whether a batch may have elements of several datasets."""
    kind = type(one).__name__
    if kind in _JOINS and (batched or kind == "_ZipDataset"):
        return True
    batched = batched or "Batch" in kind
    return any(_joins_in_a_batch(source, batched) for source in _inputs(one))
