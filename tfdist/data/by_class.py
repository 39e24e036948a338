"""A `tf.data.Dataset` rebalanced: a stream for each class, and a sampler that chooses one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from tfdist.data.batches import Batches
from tfdist.data.class_weight import are_classes, class_numbers, x_and_y
from tfdist.data.source import FOREVER, PARALLEL, batch_spec, shortened
from tfdist.errors import ArgumentError
from tfdist.samplers import ByQuota, Rows, Sampler

Tensor = Any
_DRAWS_AT_ONCE = 2**15


@dataclass(frozen=True, eq=False)
class ByClass:
    """A `tf.data.Dataset` of which a sampler draws each class as often as it should.

    `fit` makes one of a dataset that comes with such a sampler; this gives its limits. The
    k-th draw of a class is its k-th example in the order of the dataset, and after its last
    one the first comes again. So batches are a function of the dataset's order, the seed and
    the step. `ClassBalanced`, `Undersample` and `Oversample` can be the sampler. All batches
    are full: an epoch ends with the batch that its last draw is in.

    A dataset is gone through once beforehand, on every worker, to count its classes and keep
    the examples of small ones. Each large class is then a stream of its own, which reads all
    of the dataset to find its examples. A dict of datasets by class, such as one for each
    folder, reads no example in vain.

    Args:
        datasets: A dataset of examples `(x, y)` with a single number as `y`, or of batches
            `(x, y)` whose `y` are class numbers or one-hot; or a dict of datasets by class,
            each of examples or each of batches.
        buffer_size: Examples of a class that are kept in memory, if it has no more.
        classes: The class numbers of a dataset that does not end, or is not to be counted.
            `ClassBalanced()` can draw from it, with `steps_per_epoch`.
        limit: With `classes`, examples in which each class must come at least once.

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
        specs = [dataset.element_spec for dataset in parts if is_dataset(dataset)]
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
        """Whether each class has a dataset already."""
        return isinstance(self.datasets, Mapping)

    def batches(self) -> list[Any]:
        """Gives the datasets as ones of batches."""
        parts = self.datasets.values() if self.by_name else [self.datasets]
        return [d.batch(256) if d.element_spec[1].shape.rank == 0 else d for d in parts]

    def targets(self) -> Iterator[Any]:
        """Goes through all targets once."""
        for dataset in self.batches():
            for batch in dataset:
                yield x_and_y(batch)[1]


def is_dataset(value: Any) -> bool:
    """Tells a `tf.data.Dataset` from other things.

    Args:
        value: Anything.
    """
    return isinstance(value, tf.data.Dataset)


class ClassStreams(Batches):
    """Global batches drawn from a stream for each class.

    Args:
        data: Where they come from.
        sampler: Chooses the class of each draw.
        batch_size: Examples of a global batch.
        seed: The sampler's.
        steps: Steps an epoch, or None for all of the sampler's draws.
        transform: Applied to each batch.
    """

    def __init__(
        self,
        data: ByClass,
        sampler: Sampler,
        batch_size: int,
        seed: int,
        steps: int | None,
        transform: Callable[[Any], Any] | None = None,
    ) -> None:
        if not isinstance(sampler, ByQuota) or sampler.labels is not None:
            raise ArgumentError(
                "`sampler` must be ClassBalanced, Undersample or Oversample without labels to "
                f"draw from a tf.data.Dataset. Received: a sampler of type "
                f"{type(sampler).__name__}. Let the dataset yield the labels as y."
            )
        self._spec = tf.nest.map_structure(batch_spec, data.batches()[0].element_spec)
        self._streams, counts = _streams(data, steps)
        if counts is None:
            if steps is None or getattr(sampler, "alpha", None) != 1:
                raise ArgumentError(
                    "A dataset that is not counted can be drawn from by ClassBalanced(), and "
                    "with `steps_per_epoch`. Received: a sampler of type "
                    f"{type(sampler).__name__} and steps_per_epoch={steps}."
                )
            edges = np.arange(len(self._streams) + 1) * max(
                steps * batch_size, len(self._streams)
            )
            counts = np.diff(edges // len(self._streams))
            self._lengths = np.full_like(counts, FOREVER)
        else:
            self._lengths = counts
        self._drawing = sampler.of_classes(counts)
        # Of an epoch at most: a longer one costs no more for each draw.
        self._at_once = min(_DRAWS_AT_ONCE, max(batch_size, self._drawing.drawn))
        super().__init__(steps or -(-self._drawing.drawn // batch_size), transform)
        self.batch_size = batch_size
        self._seed = seed

    @property
    def continues(self) -> bool:
        """One stream runs through all epochs."""
        return True

    def batches(self, epoch: int) -> Any:
        """Builds the stream of global batches from an epoch on."""
        first = epoch * (self.steps or 0) * self.batch_size
        rounds = first // self._drawing.drawn
        before = self._drawing.quotas * rounds + self._count(
            rounds * self._drawing.drawn, first
        )

        def choose(start: np.int64) -> Rows:
            return self._drawing.between(int(start), int(start) + self._at_once, self._seed)

        def chosen(start: Tensor) -> Tensor:
            numbers = tf.numpy_function(choose, [start], tf.int64)
            return tf.ensure_shape(numbers, [self._at_once])

        choices = tf.data.Dataset.range(first, FOREVER, self._at_once).map(chosen, 1)
        streams = [
            stream.repeat().skip(int(number))
            for stream, number in zip(self._streams, before % self._lengths, strict=True)
        ]
        examples = tf.data.Dataset.choose_from_datasets(
            streams, choices.prefetch(1).unbatch(), stop_on_empty_dataset=True
        )
        return examples.batch(self.batch_size, drop_remainder=True)

    def spec(self) -> Any:
        """Gives the shapes and dtypes of a batch."""
        return self._spec

    def fingerprint(self) -> str:
        """Sums up the batch, how many examples classes have, and the sampler's first draws."""
        draws = self._drawing.between(0, self._at_once, self._seed).tobytes()
        digest = hashlib.sha256(self._lengths.tobytes() + draws).hexdigest()[:12]
        return f"{super().fingerprint()} of {len(self._streams)} classes, {digest}"

    def _count(self, begin: int, end: int) -> Rows:
        """Counts each class's draws, the draws from one to before another."""
        counts = np.zeros_like(self._lengths)
        for start in range(begin, end, _DRAWS_AT_ONCE):
            stop = min(end, start + _DRAWS_AT_ONCE)
            numbers = self._drawing.between(start, stop, self._seed)
            counts += np.bincount(numbers, minlength=len(counts))
        return counts


def _streams(data: ByClass, steps: int | None) -> tuple[list[Any], Rows | None]:
    """Makes a dataset of examples for each class, and counts them if they are to be counted."""
    parts = data.batches()
    if data.classes is not None:
        numbers = sorted(set(data.classes))
        return [_found(parts[0], number, data.limit).unbatch() for number in numbers], None
    lengths = [int(part.cardinality()) for part in parts]
    endless = tf.data.INFINITE_CARDINALITY in lengths or (min(lengths) < 0 and steps)
    if data.by_name:
        if endless:
            return [part.unbatch() for part in parts], None
        surveys = [_Survey(data.buffer_size, lambda y: [0] * len(y)) for _ in parts]
        for survey, part, name in zip(surveys, parts, data.datasets, strict=True):
            if not survey.go_through(part).counts:
                raise ArgumentError(
                    "Each of `datasets` must have an example. Received: one for class "
                    f"{name!r} that ends at once. Leave it out."
                )
        streams = [s.stream(0, part) for s, part in zip(surveys, parts, strict=True)]
        return streams, np.array([survey.counts[0] for survey in surveys])
    if endless:
        raise ArgumentError(
            "Classes can be counted only in data that ends. Received: a tf.data.Dataset "
            "without a known end. Name them: tfdist.ByClass(dataset, classes=[...]); or "
            "tell the length by tf.data.experimental.assert_cardinality."
        )
    survey = _Survey(data.buffer_size, _checked_numbers).go_through(parts[0])
    if not survey.counts:
        raise ArgumentError(
            "A data set must have at least one batch. Received: a tf.data.Dataset that ends "
            "at once. Check the filter or the path that produced it."
        )
    numbers = sorted(survey.counts)
    streams = [survey.stream(n, _only(parts[0], n)) for n in numbers]
    return streams, np.array([survey.counts[n] for n in numbers])


class _Survey:
    """Counts a dataset's classes, and keeps the examples of small ones.

    Args:
        buffer_size: Examples of a class to keep at most; of a larger one none are kept.
        numbers: Gives the classes of a batch's targets.
    """

    def __init__(self, buffer_size: int, numbers: Callable[[Any], Any]) -> None:
        self.counts: dict[int, int] = {}
        self._buffer_size = buffer_size
        self._numbers = numbers
        self._kept: dict[int, list[Any]] = {}

    def go_through(self, batches: Any) -> _Survey:
        """Counts all examples of a dataset of batches."""
        for x, y in batches:
            numbers = np.asarray(self._numbers(y))
            for number in np.unique(numbers).tolist():
                places = np.flatnonzero(numbers == number)
                self.counts[number] = self.counts.get(number, 0) + len(places)
                if self.counts[number] <= self._buffer_size:
                    part = tf.nest.map_structure(lambda v, p=places: tf.gather(v, p), (x, y))
                    self._kept.setdefault(number, []).append(part)
                else:
                    self._kept.pop(number, None)
        return self

    def stream(self, number: int, otherwise: Any) -> Any:
        """Gives a class's examples: those kept, or those of a dataset of batches."""
        kept = self._kept.get(number)
        if kept is None:
            return otherwise.unbatch()
        joined = tf.nest.map_structure(lambda *parts: tf.concat(parts, 0), *kept)
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
    """Leaves a class's examples in each batch."""

    def select(x: Any, y: Tensor) -> Any:
        mine = class_numbers(y) == number
        return tf.nest.map_structure(lambda leaf: tf.boolean_mask(leaf, mine), (x, y))

    return batches.map(select, PARALLEL, deterministic=True)


def _found(batches: Any, number: int, limit: int) -> Any:
    """Leaves a class's examples in each batch, and fails after too many without one."""

    def count(missed: Tensor, batch: Any) -> Any:
        some = tf.shape(batch[1], tf.int64)[0]
        found = tf.reduce_any(class_numbers(batch[1]) == number)
        missed = tf.where(found, tf.constant(0, tf.int64), missed + some)
        message = (
            f"Each class of ByClass must come at least once in {limit} examples. Received: no "
            f"example of class {number} in as many. Leave it out of `classes`, shuffle the "
            "data, or raise `limit`."
        )
        check = tf.debugging.Assert(missed < limit, [message])
        with tf.control_dependencies([check]):
            return tf.identity(missed), batch

    counted = batches.scan(tf.constant(0, tf.int64), count)
    return _only(counted, number)
