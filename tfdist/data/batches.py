"""Sequences of global batches: each replica takes its slice of each."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist.data import leaves
from tfdist.data.epochs import START, DataPosition
from tfdist.data.separation import SeparationCheck, check_shuffled
from tfdist.data.source import (
    FEW,
    FOREVER,
    Share,
    Source,
    bounds,
    map_elements,
    no_groups,
    rows_per_replica,
    split_over_replicas,
    without_autograph,
    without_tuning,
)
from tfdist.errors import ArgumentError
from tfdist.samplers import permute
from tfdist.strategies.base import Place

Tensor = Any


class Batches(Source):
    """A sequence of global batches; each replica takes a slice of each batch.

    Args:
        batches: Batches of one pass; None if unknown or endless.
        requested_steps: The user's number of batches an epoch, or None.
        transform: Applied to each batch, for example to add class weights.
        copies: How often each row is repeated, one copy after the other.
    """

    def __init__(
        self,
        batches: int | None,
        requested_steps: int | None,
        transform: Callable[[Any], Any] | None = None,
        copies: int = 1,
    ) -> None:
        self.batches = batches
        self.requested_steps = requested_steps
        self.transform = transform
        self.copies = copies
        self.watch: SeparationCheck | None = None

    @abc.abstractmethod
    def stream(self, position: DataPosition) -> Any:
        """Builds the `tf.data.Dataset` of global batches.

        Args:
            position: The position of the first batch.
        """

    def check_order(self, separation: int | None, comes_again: bool) -> None:
        """Refuses batches in which an example of `DPFTRL` may come too early.

        Args:
            separation: As in `SeparationCheck`.
            comes_again: Whether there is more than one pass.
        """

    def note_iterator(self, position: DataPosition) -> None:
        """Tells the check of the separation that a pass begins."""
        if self.watch is not None:
            self.watch.begin_pass()

    def shares(self, place: Place, position: DataPosition = START) -> Any:
        """Builds the stream of shares by slicing each batch."""
        batches = self.stream(position)
        if self.watch is not None:
            batches = self.watch.watching(batches)
        if self.transform is not None:
            batches = map_elements(batches, self.transform)

        is_tuple = isinstance(batches.element_spec, tuple)
        copies = self.copies

        def share(*batch_and_replica: Any) -> Share:
            *parts, replica = batch_and_replica
            batch = tuple(parts) if is_tuple else parts[0]
            if place.num_replicas == 1:
                return Share(_repeated(batch, copies))
            total = leaves.count(tf.nest.flatten(batch)[0])
            begin, end = bounds(total, replica, place)
            # A share without rows takes an arbitrary row as padding.
            first_row = tf.minimum(begin, total - 1)
            stop = tf.maximum(end, first_row + 1)

            def part(leaf: Tensor) -> Tensor:
                return leaves.with_num_rows(
                    leaves.cut(leaf, first_row, stop), rows_per_replica(leaf.shape[0], place)
                )

            data = tf.nest.map_structure(part, batch)
            check = _check(batch) if place.num_workers > 1 else tf.zeros([4])
            rows, total, offset = (copies * count for count in (end - begin, total, begin))
            return Share(_repeated(data, copies), rows, total, offset, check, no_groups())

        return split_over_replicas(batches, share, place)

    def spec_of_shares(self, spec: Any) -> Any:
        """Returns the shapes and dtypes of a batch after `transform`, with all copies.

        Args:
            spec: The shapes and dtypes before it.
        """
        if self.transform is not None:
            spec = transformed_spec(self.transform, spec)
        if self.copies == 1:
            return spec
        return tf.nest.map_structure(lambda leaf: _spec_of_copies(leaf, self.copies), spec)


def _repeated(batch: Any, copies: int) -> Any:
    """Repeats each row of a batch, one copy after the other."""
    if copies == 1:
        return batch
    rows = tf.repeat(tf.range(leaves.count(tf.nest.flatten(batch)[0])), copies)

    def part(leaf: Tensor) -> Tensor:
        count = leaf.shape[0]
        return leaves.with_num_rows(
            leaves.gather(leaf, rows), None if count is None else count * copies
        )

    return tf.nest.map_structure(part, batch)


def _spec_of_copies(spec: Any, copies: int) -> Any:
    count = spec.shape[0]
    return leaves.spec(spec, None if count is None else count * copies)


def _check(batch: Any) -> Tensor:
    """Computes `Share.check` from the first and last row of all leaves."""
    sums = tf.zeros([4])
    for part in leaves.components(batch):
        if part.dtype.is_numeric:
            ends = tf.concat([part[:1], part[-1:]], 0)
            ends = tf.cast(tf.reshape(ends, [-1]), tf.float32)
            position = tf.range(tf.size(ends), dtype=tf.float32)
            # Irregular factors, so that values in another order have another sum.
            factors = tf.sin(position[:, None] * [1.1, 1.7, 2.3, 3.1] + [1.0, 2.0, 3.0, 4.0])
            sums += tf.reduce_sum(
                tf.where(tf.math.is_finite(ends), ends, 0.0)[:, None] * factors, 0
            )
    # The low bits of a float are the ones that differ. Six bits are enough, and so few that
    # float32 adds these numbers and their squares over all replicas without rounding: all
    # numbers are equal if replicas * (sum of squares) = (sum) ** 2.
    return tf.cast(tf.bitwise.bitwise_and(tf.bitcast(sums, tf.int32), 63), tf.float32)


class GeneratorBatches(Batches):
    """A Python generator of global batches; it can be read once.

    Args:
        generator: Yields batches as in `Share.data`.
        steps: Batches an epoch, or None if the generator ends by itself.
        training: Whether an epoch goes on where the last one stopped.
    """

    repeatable = False

    def __init__(self, generator: Iterator[Any], steps: int | None, training: bool) -> None:
        super().__init__(None, steps)
        self.spans_passes = training  # batches that are drawn ahead must not be lost
        generator = map(_as_batch, generator)
        # Keras reads two batches in advance, and begins every evaluation with them.
        self._peeked = list(itertools.islice(generator, 2))
        if not self._peeked:
            raise ArgumentError(
                "A generator must yield at least one batch. Received: one that ends at once. "
                "Generators are read once: make a new one for each call."
            )
        self._first = self._peeked[0]
        self._later = generator
        self._unread = itertools.chain(self._peeked, generator)

    def sample(self, rows: int = FEW) -> Any:
        """Returns the first batch."""
        return _as_tensors(self._first)

    def stream(self, position: DataPosition) -> Any:
        """Wraps the rest of the generator, after the batches that an earlier process drew."""
        for _ in itertools.islice(self._unread, position.num_drawn):
            pass

        def batches() -> Iterator[Any]:
            if self.spans_passes:
                return self._unread
            return itertools.islice(itertools.chain(self._peeked, self._later), self.steps)

        return without_tuning(
            tf.data.Dataset.from_generator(batches, output_signature=self.spec())
        )

    def spec(self) -> Any:
        """Returns the shapes and dtypes of a batch."""
        return tf.nest.map_structure(leaves.spec, self._first)


class PyDatasetBatches(Batches):
    """A `keras.utils.PyDataset`: batches by number, in threads, shuffled when asked.

    Args:
        dataset: The PyDataset. Every worker computes every batch and takes its slice.
        steps: Batches an epoch, or None for all.
        shuffle: Whether each epoch has its own order of batches.
        seed: Chooses the orders.
        transform: Applied to each batch.
        copies: As in `Batches`.
    """

    def __init__(
        self,
        dataset: Any,
        steps: int | None,
        *,
        shuffle: bool,
        seed: int,
        transform: Callable[[Any], Any] | None = None,
        copies: int = 1,
    ) -> None:
        length = dataset.num_batches
        if length == 0:
            raise ArgumentError(
                "A data set must have at least one batch. Received: a PyDataset of length 0."
            )
        super().__init__(length, steps, transform, copies)
        self.dataset = dataset
        self.shuffle = shuffle and length is not None
        self.seed = seed
        self._first = _as_batch(dataset[0])
        self._spec = tf.nest.map_structure(leaves.spec, self._first)

    def go_on_after(self, epochs: int) -> None:
        """Calls `on_epoch_end` as often as the earlier process did."""
        for _ in range(epochs):
            self.dataset.on_epoch_end()

    def on_epoch_end(self) -> None:
        """Calls the dataset's `on_epoch_end`, as Keras does."""
        self.dataset.on_epoch_end()

    def sample(self, rows: int = FEW) -> Any:
        """Returns the first batch."""
        batch = _as_tensors(self._first)
        return batch if batch is None or self.transform is None else self.transform(*batch)

    def stream(self, position: DataPosition) -> Any:
        """Builds the stream of a pass."""
        specs = leaves.components(self._spec)

        def load(place: np.int64) -> list[Any]:
            batch = _as_batch(self.dataset[self._number(int(place), position.number)])
            pairs = zip(leaves.components(batch), specs, strict=True)
            return [np.asarray(part, spec.dtype.as_numpy_dtype) for part, spec in pairs]

        @without_autograph
        def batch(place: Tensor) -> Any:
            loaded = tf.numpy_function(load, [place], [spec.dtype for spec in specs])
            for part, spec in zip(loaded, specs, strict=True):
                part.set_shape(spec.shape)
            return tf.nest.pack_sequence_as(self._spec, loaded, expand_composites=True)

        end = FOREVER if self.batches is None else self.batches
        places = tf.data.Dataset.range(position.num_drawn, end)
        workers = max(1, self.dataset.workers)
        return without_tuning(places.map(batch, workers, deterministic=True))

    def check_order(self, separation: int | None, comes_again: bool) -> None:
        """Refuses batches that `fit` shuffles in each pass."""
        if self.shuffle and comes_again and separation is not None:
            data = "a PyDataset whose batches `fit` shuffles in each epoch"
            check_shuffled(data, "Pass fit(shuffle=False).", separation, in_one_batch=False)

    def _number(self, place: int, number: int) -> int:
        """Returns the number of the batch at a position of a pass."""
        if not self.shuffle or self.batches is None:
            return place
        order = permute(np.array([place]), self.batches, (self.seed, number))
        return int(order[0])

    def spec(self) -> Any:
        """Returns the shapes and dtypes of a batch."""
        return self.spec_of_shares(self._spec)


def transformed_spec(transform: Callable[..., Any], spec: Any) -> Any:
    """Returns the shapes and dtypes of a batch after a transformation.

    Args:
        transform: The transformation; it takes the parts of a batch.
        spec: The shapes and dtypes before it.
    """
    leaves = spec if isinstance(spec, tuple) else (spec,)
    traced = tf.function(transform, autograph=False)
    return traced.get_concrete_function(*leaves).structured_outputs


def _as_batch(value: Any) -> Any:
    """Reads a batch of a generator or PyDataset; dense leaves become NumPy arrays."""
    if isinstance(value, dict):
        return {key: _as_batch(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        # (x, y, None) means (x, y), as it does in Keras.
        return tuple(_as_batch(item) for item in value if item is not None)
    if leaves.is_composite(value):
        return leaves.composite(value)
    array = np.asarray(value)
    return array.astype(keras.config.floatx()) if array.dtype.kind == "f" else array


def _as_tensors(batch: Any) -> Any:
    """Returns a batch's tensors; None if a leaf is sparse or ragged."""
    if any(leaves.is_composite(leaf) for leaf in tf.nest.flatten(batch)):
        return None
    return tf.nest.map_structure(tf.convert_to_tensor, batch)
