"""Global batches from a `tf.data.Dataset`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tfdist._keras import datasets
from tfdist.data.batches import Batches
from tfdist.data.epochs import DataPosition
from tfdist.data.separation import check_places
from tfdist.errors import ArgumentError

_MEMORY = "_tfdist_read"


class DatasetBatches(Batches):
    """A `tf.data.Dataset` of global batches.

    Args:
        dataset: Yields batches as in `Share.data`.
        steps: The user's number of batches an epoch, or None.
        transform: Applied to each batch.
        copies: As in `Batches`.
        several_workers: Whether other processes draw from the same dataset.

    Attributes:
        user_dataset: The dataset as the user made it.
    """

    def __init__(
        self,
        dataset: Any,
        steps: int | None,
        *,
        transform: Callable[[Any], Any] | None = None,
        copies: int = 1,
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
        super().__init__(length if length > 0 else None, steps, transform, copies)
        self.user_dataset = dataset
        self.dataset = ordered(dataset, several_workers)
        self._iterators = 0

    is_same_each_pass = True

    def repetitions(self) -> list[tuple[int, bool]]:
        """Lists what the dataset repeats by itself; see `datasets.repetitions`."""
        return datasets.repetitions(self.user_dataset)

    def check_order(self, separation: int | None, comes_again: bool) -> None:
        """Refuses a dataset in which an example may come too early, or decide about others."""
        check_places(self.user_dataset, separation, comes_again)

    def begin_anew(self) -> None:
        """Draws from a copy whose shuffles have never been drawn from."""
        self.dataset, self._iterators = datasets.copy_of(self.user_dataset), 0

    def suspects(self) -> list[str]:
        """Names the operations that shuffle, draw random numbers or call Python."""
        return datasets.may_differ(self.user_dataset)

    def note_iterator(self, position: DataPosition) -> None:
        """Makes the iterators that Keras would have made before: each has another order."""
        super().note_iterator(position)
        self._make_iterators(position.iterators)
        self._iterators += 1

    def finish(self, position: DataPosition) -> None:
        """Leaves the dataset as Keras would, so that the next pass has the same order."""
        self._make_iterators(position.iterators + position.is_open)

    def _make_iterators(self, number: int) -> None:
        for _ in range(self._iterators, number):
            iter(self.dataset)
        self._iterators = max(self._iterators, number)

    def stream(self, position: DataPosition) -> Any:
        """Returns the dataset from a position on."""
        return self.dataset.skip(position.num_drawn) if position.num_drawn else self.dataset

    def spec(self) -> Any:
        """Returns the shapes and dtypes of a batch."""
        return self.spec_of_shares(self.dataset.element_spec)


def ordered(dataset: Any, several_workers: bool) -> Any:
    """Returns a dataset with the same order in every process and a new order in every call.

    Args:
        dataset: A user's `tf.data.Dataset`.
        several_workers: Whether other processes draw from the same dataset.

    Returns:
        The dataset itself if it has such an order, otherwise a copy with its own order.
    """
    memory = vars(dataset).setdefault(_MEMORY, {"calls": 0, "copy": None})
    number, memory["calls"] = memory["calls"], memory["calls"] + 1
    try:
        if number and datasets.reshuffles_ahead(dataset):
            # The number of elements drawn ahead differs between processes.
            return datasets.copy_of(dataset, number)
        if several_workers and datasets.draws_in_parallel(dataset) is not None:
            memory["copy"] = memory["copy"] or datasets.copy_of(dataset)
            return memory["copy"]
    except tf.errors.OpError:  # too large to be serialized
        return dataset
    return dataset
