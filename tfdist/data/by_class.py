"""Splits a `tf.data.Dataset` into a stream for each class."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from tfdist.data.class_weight import are_classes, class_numbers, x_and_y
from tfdist.data.source import map_elements, shortened, without_autograph
from tfdist.errors import ArgumentError
from tfdist.samplers import Rows

Tensor = Any


@dataclass(frozen=True, eq=False)
class ByClass:
    """A `tf.data.Dataset` from which a sampler draws by class.

    Pass a dataset with a `ClassBalanced`, `Undersample` or `Oversample` sampler to `fit`, and
    `fit` makes a `ByClass` with the default limits. Pass a `ByClass` to set the limits.

    The k-th draw of a class is its k-th example in the order of the dataset. After the last
    example the first one comes again. So batches are a function of the dataset's order, the
    seed and the step. All batches are full: an epoch ends with the batch of its last draw.

    Every worker reads the dataset once before training, to count the classes and to keep the
    examples of small classes in memory. Each large class then has its own stream, which reads
    the whole dataset to find its examples. A dict of datasets by class, such as one for each
    folder, avoids reading examples of other classes.

    Args:
        datasets: A dataset of examples `(x, y)` with a single number as `y`, or of batches
            `(x, y)` whose `y` are class numbers or one-hot; or a dict of datasets by class,
            each of examples or each of batches.
        buffer_size: A class with at most this many examples is kept in memory.
        classes: The class numbers of a dataset that does not end, or that you do not want to
            count. Then the sampler must be `ClassBalanced()`, with `steps_per_epoch`.
        limit: With `classes`, each class must come at least once in this many examples.

    Raises:
        ArgumentError: The dataset is not of this kind.

    Example:
        >>> import keras, numpy as np, tensorflow as tf, tfdist
        >>> x, y = np.ones((100, 4), "float32"), np.array([0] * 95 + [1] * 5)
        >>> dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(10)
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        >>> model.compile("sgd", keras.losses.BinaryCrossentropy(from_logits=True))
        >>> sampler = tfdist.samplers.ClassBalanced()
        >>> data = tfdist.ByClass(dataset, buffer_size=1000)
        >>> history = tfdist.fit(model, data, batch_size=20, sampler=sampler, verbose=0)
    """

    datasets: Any
    buffer_size: int = 10_000
    classes: Sequence[int] | None = None
    limit: int = 100_000

    def __post_init__(self) -> None:
        for name, least in (("buffer_size", 0), ("limit", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ArgumentError(
                    f"`{name}` must be a whole number of at least {least}. Received: "
                    f"{name}={value!r}."
                )
        parts = self.datasets.values() if self.by_name else [self.datasets]
        specs = [
            dataset.element_spec for dataset in parts if isinstance(dataset, tf.data.Dataset)
        ]
        if not specs or len(specs) < len(parts):
            raise ArgumentError(
                "`datasets` must be a tf.data.Dataset or a dict of them by class. Received: "
                f"datasets={shortened(self.datasets)}."
            )
        for spec in specs:
            if not isinstance(spec, tuple) or len(spec) != 2 or tf.nest.is_nested(spec[1]):
                raise ArgumentError(
                    "`datasets` must yield (x, y), y one tensor. Received: one that yields "
                    f"{shortened(spec)}."
                )
            if any(not isinstance(leaf, tf.TensorSpec) for leaf in tf.nest.flatten(spec)):
                raise ArgumentError(
                    "`datasets` must yield dense tensors. Received: one that yields "
                    f"{shortened(spec)}."
                )
        if self.classes is not None and (self.by_name or not len(set(self.classes))):
            raise ArgumentError(
                "`classes` must be class numbers of one dataset. Received: "
                f"classes={self.classes!r} and datasets of type "
                f"{type(self.datasets).__name__}."
            )

    @property
    def by_name(self) -> bool:
        """Whether `datasets` is a dict with a dataset for each class."""
        return isinstance(self.datasets, Mapping)

    def batches(self) -> list[Any]:
        """Returns the datasets as datasets of batches."""
        parts = self.datasets.values() if self.by_name else [self.datasets]
        return [d.batch(256) if d.element_spec[1].shape.rank == 0 else d for d in parts]

    def targets(self) -> Iterator[Any]:
        """Yields all targets once, in batches."""
        for dataset in self.batches():
            for batch in dataset:
                yield x_and_y(batch)[1]


def may_not_end(dataset: Any, steps: int | None) -> bool:
    """Returns whether a dataset may be endless, so that it must not be read to its end.

    Args:
        dataset: A `tf.data.Dataset`.
        steps: Steps an epoch, or None. With steps, a dataset of unknown length may be endless.
    """
    cardinality = int(dataset.cardinality())
    unknown = cardinality == tf.data.UNKNOWN_CARDINALITY
    return cardinality == tf.data.INFINITE_CARDINALITY or (unknown and bool(steps))


def streams(data: ByClass, steps: int | None) -> tuple[list[Any], Rows | None]:
    """Makes a dataset of examples for each class, and counts the classes if it can.

    Args:
        data: The data.
        steps: Steps an epoch, or None.

    Returns:
        A dataset for each class, and the examples of each class or None.

    Raises:
        ArgumentError: The classes cannot be counted, or there are none.
    """
    parts = data.batches()
    if data.classes is not None:
        numbers = sorted(set(data.classes))
        return [
            _require_class(parts[0], number, data.limit).unbatch() for number in numbers
        ], None
    endless = any(may_not_end(part, steps) for part in parts)
    if data.by_name:
        if endless:
            return [part.unbatch() for part in parts], None
        counters = [_ClassCounter(data.buffer_size, lambda y: [0] * len(y)) for _ in parts]
        for counter, part, name in zip(counters, parts, data.datasets, strict=True):
            if not counter.go_through(part).counts:
                raise ArgumentError(
                    "Each of `datasets` must have an example. Received: one for class "
                    f"{name!r} that ends at once. Leave it out."
                )
        parts_of = [s.stream(0, part) for s, part in zip(counters, parts, strict=True)]
        return parts_of, np.array([counter.counts[0] for counter in counters])
    if endless:
        raise ArgumentError(
            "Classes can be counted only in data that ends. Received: a tf.data.Dataset "
            "without a known end. Name them: tfdist.ByClass(dataset, classes=[...]); or "
            "tell the length by tf.data.experimental.assert_cardinality."
        )
    counter = _ClassCounter(data.buffer_size, _checked_numbers).go_through(parts[0])
    if not counter.counts:
        raise ArgumentError(
            "A data set must have at least one batch. Received: a tf.data.Dataset that ends "
            "at once. Check the filter or the path that produced it."
        )
    numbers = sorted(counter.counts)
    class_streams = [counter.stream(n, _only(parts[0], n)) for n in numbers]
    return class_streams, np.array([counter.counts[n] for n in numbers])


class _ClassCounter:
    """Counts a dataset's classes, and keeps the examples of small classes.

    Args:
        buffer_size: Only classes with at most this many examples are kept.
        numbers: Returns the classes of a batch's targets.
    """

    def __init__(self, buffer_size: int, numbers: Callable[[Any], Any]) -> None:
        self.counts: dict[int, int] = {}
        self._buffer_size = buffer_size
        self._numbers = numbers
        self._small_classes: dict[int, list[Any]] = {}

    def go_through(self, batches: Any) -> _ClassCounter:
        """Counts all examples of a dataset of batches."""
        for x, y in batches:
            numbers = np.asarray(self._numbers(y))
            for number in np.unique(numbers).tolist():
                places = np.flatnonzero(numbers == number)
                self.counts[number] = self.counts.get(number, 0) + len(places)
                if self.counts[number] <= self._buffer_size:
                    part = tf.nest.map_structure(lambda v, p=places: tf.gather(v, p), (x, y))
                    self._small_classes.setdefault(number, []).append(part)
                else:
                    # The count only grows: a class that is once too large is never collected
                    # again.
                    self._small_classes.pop(number, None)
        return self

    def stream(self, number: int, otherwise: Any) -> Any:
        """Returns a class's examples: from memory, or from another dataset of batches."""
        batches = self._small_classes.get(number)
        if batches is None:
            return otherwise.unbatch()
        joined = tf.nest.map_structure(lambda *parts: tf.concat(parts, 0), *batches)
        return tf.data.Dataset.from_tensor_slices(joined)


def _checked_numbers(y: Any) -> Any:
    numbers = class_numbers(y).numpy()
    if not are_classes(y) or numbers.min(initial=0) < 0 or numbers.ndim != 1:
        raise ArgumentError(
            "A dataset to be drawn from by class needs targets that are class numbers from 0 "
            f"on, or one-hot. Received: y={shortened(np.asarray(y))}. Pass a dict of "
            "datasets by class."
        )
    return numbers


def _only(batches: Any, number: int) -> Any:
    """Keeps only a class's examples in each batch."""

    def select(x: Any, y: Tensor) -> Any:
        is_of_class = class_numbers(y) == number
        return tf.nest.map_structure(lambda leaf: tf.boolean_mask(leaf, is_of_class), (x, y))

    return map_elements(batches, select)


def _require_class(batches: Any, number: int, limit: int) -> Any:
    """Keeps only a class's examples; fails after too many examples of other classes."""

    @without_autograph
    def count(num_missed: Tensor, batch: Any) -> Any:
        num_examples = tf.shape(batch[1], tf.int64)[0]
        has_class = tf.reduce_any(class_numbers(batch[1]) == number)
        num_missed = tf.where(has_class, tf.constant(0, tf.int64), num_missed + num_examples)
        message = (
            f"Each class of ByClass must come at least once in {limit} examples. Received: no "
            f"example of class {number} in as many. Leave it out of `classes`, shuffle the "
            "data, or raise `limit`."
        )
        check = tf.debugging.Assert(num_missed < limit, [message])
        with tf.control_dependencies([check]):
            return tf.identity(num_missed), batch

    checked = batches.scan(tf.constant(0, tf.int64), count)
    return _only(checked, number)
