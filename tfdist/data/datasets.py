"""Global batches from a `tf.data.Dataset`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tfdist._keras import datasets
from tfdist.data.batches import Batches, transformed_spec
from tfdist.data.epochs import DataPosition
from tfdist.errors import ArgumentError

_MEMORY = "_tfdist_read"


class DatasetBatches(Batches):
    """A `tf.data.Dataset` of global batches.

    Args:
        dataset: Yields what `Share.data` holds.
        steps: Batches an epoch, if the user has said.
        transform: Applied to each batch.
        several_workers: Whether other processes draw from the same dataset.

    Attributes:
        given: The dataset as the user made it.
    """

    def __init__(
        self,
        dataset: Any,
        steps: int | None,
        *,
        transform: Callable[[Any], Any] | None = None,
        several_workers: bool = False,
    ) -> None:
        length = int(dataset.cardinality())
        if length == 0:
            raise ArgumentError(
                "A data set must have at least one batch. Received: a tf.data.Dataset of "
                "length 0. Check the filter or the path that produced it."
            )
        if length == tf.data.INFINITE_CARDINALITY and steps is None:
            raise ArgumentError(
                "A tf.data.Dataset without an end needs the number of batches of an epoch. "
                "Received: one that repeats without end. Pass steps_per_epoch to fit, "
                "validation_steps for validation_data, or steps to evaluate and predict; or "
                "leave out .repeat()."
            )
        super().__init__(length if length > 0 else None, steps, transform)
        self.given = dataset
        self.dataset = ordered(dataset, several_workers)
        self._iterators = 0

    repeats = True

    def repetitions(self) -> list[tuple[int, bool]]:
        """Lists what the dataset repeats by itself; see `datasets.repetitions`."""
        return datasets.repetitions(self.given)

    def begin_anew(self) -> None:
        """Draws from a copy whose shuffles have never been drawn from."""
        self.dataset, self._iterators = datasets.copied(self.given), 0

    def suspects(self) -> list[str]:
        """Names the operations that shuffle, draw random numbers or call Python."""
        return datasets.may_differ(self.given)

    def note_iterator(self, position: DataPosition) -> None:
        """Makes iterators that Keras would have made before: each shuffles in another way."""
        super().note_iterator(position)
        self._make_iterators(position.iterators)
        self._iterators += 1

    def finish(self, position: DataPosition) -> None:
        """Leaves the dataset as Keras would: what comes next is shuffled in another way."""
        self._make_iterators(position.iterators + position.is_open)

    def _make_iterators(self, number: int) -> None:
        for _ in range(self._iterators, number):
            iter(self.dataset)
        self._iterators = max(self._iterators, number)

    def stream(self, position: DataPosition) -> Any:
        """Gives the dataset."""
        return self.dataset.skip(position.drawn) if position.drawn else self.dataset

    def spec(self) -> Any:
        """Gives the shapes and dtypes of a batch."""
        spec = self.dataset.element_spec
        return spec if self.transform is None else transformed_spec(self.transform, spec)


def ordered(dataset: Any, several_workers: bool) -> Any:
    """Gives a dataset whose order is the same in every process, and in every call but new.

    Args:
        dataset: A user's `tf.data.Dataset`.
        several_workers: Whether other processes draw from the same dataset.

    Returns:
        The dataset itself, where that is so; else a copy whose order is its own.
    """
    memory = vars(dataset).setdefault(_MEMORY, {"calls": 0, "copy": None})
    number, memory["calls"] = memory["calls"], memory["calls"] + 1
    try:
        if number and datasets.reshuffles_ahead(dataset):
            # How far its buffers have come ahead differs from process to process.
            return datasets.copied(dataset, number)
        if several_workers and datasets.draws_in_parallel(dataset) is not None:
            memory["copy"] = memory["copy"] or datasets.copied(dataset)
            return memory["copy"]
    except tf.errors.OpError:  # too large to be written down
        return dataset
    return dataset
