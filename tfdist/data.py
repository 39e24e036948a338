"""From what `fit` was given to each replica's stream of shares.

Two roads. Arrays have rows that a sampler chooses by number. Everything else is a
sequence of global batches. On both, replica r of R takes rows [n*r//R, n*(r+1)//R) of a
global batch of n, and a share without rows carries one row that counts nothing.
"""

from __future__ import annotations

import abc
import contextlib
import hashlib
import itertools
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tfdist.errors import ArgumentError
from tfdist.samplers import Sampler, permute
from tfdist.strategies.base import Place, Strategy

Tensor = Any
_PARALLEL = tf.data.AUTOTUNE
_FOREVER = 2**62
_ROWS_AT_ONCE = 2**14


class Share(NamedTuple):
    """One replica's part of a global batch.

    Attributes:
        data: What Keras's steps take: `x`, `(x, y)` or `(x, y, sample_weight)`, at least
            one row.
        rows: Scalar int64, rows that count: 0 when the only row is padding.
        total: Scalar int64, rows of the global batch.
        offset: Scalar int64, the row of the global batch at which the share begins.
        check: float32 of shape [4], whole numbers below 64 that differ when global batches
            differ. Workers compare them at every step; arrays are compared beforehand.
    """

    data: Any
    rows: Tensor
    total: Tensor
    offset: Tensor
    check: Tensor


def bounds(total: Tensor, replica: Tensor, place: Place) -> tuple[Tensor, Tensor]:
    """Says which rows of a global batch are a replica's.

    Args:
        total: Rows of the global batch.
        replica: The replica's global number.
        place: How many replicas there are.

    Returns:
        The first row and the one after the last.
    """
    replicas = place.num_replicas
    if replicas == 1:
        return tf.zeros_like(total), total
    return total * replica // replicas, total * (replica + 1) // replicas


class Source(abc.ABC):
    """Data that can be dealt out in shares.

    Attributes:
        steps: Global batches in an epoch, or None when unknown.
    """

    steps: int | None

    @abc.abstractmethod
    def shares(self, place: Place, epoch: int) -> Any:
        """Builds the stream of the local replicas' shares, from an epoch on.

        Args:
            place: Which replicas are local.
            epoch: Epochs drawn before.

        Returns:
            A `tf.data.Dataset` of `Share`, `place.local_replicas` elements a step.
        """

    @property
    def continues(self) -> bool:
        """Whether one stream runs through all epochs, rather than one for each."""
        return False

    @abc.abstractmethod
    def spec(self) -> Any:
        """Gives the structure of a batch, with leaves that have `shape` and `dtype`."""

    def fingerprint(self) -> str:
        """Sums up what every worker must have alike before the first step."""
        return str(tf.nest.map_structure(lambda s: f"{s.dtype}{list(s.shape)}", self.spec()))

    def on_epoch_end(self) -> None:  # noqa: B027, most sources need nothing
        """Called when an epoch's stream has ended."""


# --- arrays ---------------------------------------------------------------------------


@dataclass
class Arrays(Source):
    """Arrays in memory, rows chosen by a sampler.

    Attributes:
        data: Nested structure of tensors with equal first dimensions, as in `Share.data`.
        sampler: Chooses the rows of each step.
        batch_size: Examples of a full global batch.
        seed: The sampler's.
        steps: Steps an epoch; when fewer or more than the sampler's, epochs go on where
            the last one stopped.
        endless: Whether the stream goes through all epochs (training) or ends after one.
    """

    data: Any
    sampler: Sampler
    batch_size: int
    seed: int
    steps: int
    endless: bool

    @property
    def num_rows(self) -> int:
        """Examples."""
        return int(tf.nest.flatten(self.data)[0].shape[0])

    @property
    def continues(self) -> bool:
        """Whether one stream runs through all epochs."""
        return self.endless

    def shares(self, place: Place, epoch: int) -> Any:
        """Builds the stream of shares; each gathers its own rows only."""

        def share(rows: Tensor, total: Tensor, replica: Tensor) -> Share:
            if place.num_replicas == 1:
                return Share(self._gather(rows[:total]), total, total, 0, tf.zeros([4]))
            begin, end = bounds(total, replica, place)
            padded = tf.minimum(begin, total - 1)
            mine = rows[padded : tf.maximum(end, padded + 1)]
            return Share(self._gather(mine), end - begin, total, begin, tf.zeros([4]))

        return _dealt(self._row_numbers(epoch), share, place)

    def _gather(self, rows: Tensor) -> Any:
        return tf.nest.map_structure(lambda column: tf.gather(column, rows), self.data)

    def _row_numbers(self, epoch: int) -> Any:
        """Builds a dataset of global batches' row numbers, padded at the end, and their count.

        The sampler is asked for many steps at once, ahead of those that gather their rows.
        """
        at_once = max(1, min(_ROWS_AT_ONCE // self.batch_size, self.steps))
        first_step = epoch * self.steps if self.endless else 0

        def draw(first: np.int64) -> tuple[Any, Any]:
            batches = self.sampler.batches(
                int(first),
                at_once,
                num_rows=self.num_rows,
                batch_size=self.batch_size,
                seed=self.seed,
            )
            sizes = np.array([len(rows) for rows in batches])
            padded = np.zeros((at_once, sizes.max()), np.int64)
            for row, batch in zip(padded, batches, strict=True):
                row[: len(batch)] = batch
            return padded, sizes

        def drawn(first: Tensor) -> tuple[Tensor, Tensor]:
            rows, sizes = tf.numpy_function(draw, [first], (tf.int64, tf.int64))
            return tf.ensure_shape(rows, [at_once, None]), tf.ensure_shape(sizes, [at_once])

        numbers = tf.data.Dataset.range(first_step, _FOREVER, at_once)
        batches = numbers.map(drawn, 1).prefetch(1).unbatch()
        return batches if self.endless else batches.take(self.steps)

    def spec(self) -> Any:
        """Gives the shapes and dtypes of a batch."""
        return tf.nest.map_structure(_batch_spec, self.data)

    def fingerprint(self) -> str:
        """Sums up number, shape and some rows of the arrays."""
        rows = np.unique(np.linspace(0, self.num_rows - 1, 64).astype(np.int64))
        digest = hashlib.sha256()
        for column in tf.nest.flatten(self.data):
            digest.update(np.ascontiguousarray(tf.gather(column, rows).numpy()).tobytes())
        return f"{self.num_rows} rows of {super().fingerprint()}, {digest.hexdigest()[:12]}"


def to_tensors(structure: Any, name: str) -> Any:
    """Converts a nested structure of arrays to tensors on the host, floats to `floatx()`.

    Args:
        structure: Nested dicts, lists and tuples of NumPy arrays, tensors or pandas frames.
        name: The argument's name, for messages.

    Returns:
        The structure, lists as tuples, with `tf.Tensor` leaves.

    Raises:
        ArgumentError: A leaf is not an array, or has no rows dimension.
    """
    if isinstance(structure, dict):
        return {key: to_tensors(value, f"{name}[{key!r}]") for key, value in structure.items()}
    if isinstance(structure, list | tuple):
        return tuple(to_tensors(v, f"{name}[{i}]") for i, v in enumerate(structure))
    array = structure
    if type(array).__module__.startswith("pandas.") and hasattr(array, "to_numpy"):
        array = array.to_numpy()
        array = array[:, None] if array.ndim == 1 else array  # as Keras reads a Series
    if not is_array(array):
        raise ArgumentError(
            f"`{name}` must be an array, or a dict, list or tuple of arrays. "
            f"Received: {name}={_short(structure)}. Convert it with np.asarray."
        )
    with tf.device("CPU:0"):
        tensor = tf.convert_to_tensor(array if tf.is_tensor(array) else np.asarray(array))
        if tensor.dtype.is_floating:
            tensor = tf.cast(tensor, keras.config.floatx())
    if tensor.shape.rank == 0:
        raise ArgumentError(
            f"`{name}` must have a first dimension of examples. Received: {name} with shape ()."
        )
    return tensor


def is_array(value: Any) -> bool:
    """Tells arrays of any library from other inputs.

    Args:
        value: Anything.
    """
    return tf.is_tensor(value) or (hasattr(value, "__array__") and hasattr(value, "shape"))


def is_arrays(structure: Any) -> bool:
    """Tells whether an input is arrays, nested or not, rather than an iterable of batches.

    Args:
        structure: What a user passed as `x`.
    """
    leaves = tf.nest.flatten(structure)
    return bool(leaves) and all(
        is_array(leaf) or type(leaf).__module__.startswith("pandas.") for leaf in leaves
    )


def count_rows(**columns: Any) -> int:
    """Counts the examples of tensors that must have equally many.

    Args:
        **columns: Nested structures of tensors by the name of their argument; None is
            skipped.

    Raises:
        ArgumentError: The counts differ, or there are no examples.
    """
    counts = {
        name: sorted({int(leaf.shape[0]) for leaf in tf.nest.flatten(column)})
        for name, column in columns.items()
        if column is not None
    }
    distinct = {count for found in counts.values() for count in found}
    received = ", ".join(f"{name} with {found} rows" for name, found in counts.items())
    if len(distinct) > 1:
        raise ArgumentError(
            f"All arrays must have the same number of rows. Received: {received}."
        )
    if distinct == {0}:
        raise ArgumentError(
            f"There must be at least one example. Received: {received}. "
            "Check the filter or the path that produced the data."
        )
    return distinct.pop()


# --- sequences of batches -------------------------------------------------------------


class Batches(Source):
    """Global batches in an order of their own; each replica takes a slice of each.

    Args:
        steps: Batches an epoch, or None when unknown.
        transform: Applied to each batch, for example to add class weights.
    """

    def __init__(
        self, steps: int | None, transform: Callable[[Any], Any] | None = None
    ) -> None:
        self.steps = steps
        self.transform = transform

    @abc.abstractmethod
    def batches(self, epoch: int) -> Any:
        """Builds the `tf.data.Dataset` of global batches.

        Args:
            epoch: Epochs drawn before.
        """

    def shares(self, place: Place, epoch: int) -> Any:
        """Builds the stream of shares by slicing each batch."""
        batches = self.batches(epoch)
        if self.transform is not None:
            batches = batches.map(self.transform, _PARALLEL, deterministic=True)

        def share(*batch_and_replica: Any) -> Share:
            *parts, replica = batch_and_replica
            batch = parts[0] if len(parts) == 1 else tuple(parts)
            first = tf.nest.flatten(batch)[0]
            total = tf.cast(
                first.nrows() if isinstance(first, tf.RaggedTensor) else tf.shape(first)[0],
                tf.int64,
            )
            begin, end = bounds(total, replica, place)
            padded = tf.minimum(begin, total - 1)
            stop = tf.maximum(end, padded + 1)
            data = tf.nest.map_structure(lambda leaf: _slice(leaf, padded, stop), batch)
            return Share(data, end - begin, total, begin, _check(batch))

        return _dealt(batches, share, place)


def _dealt(batches: Any, share: Callable[..., Share], place: Place) -> Any:
    """Makes the local replicas' shares of each batch, one after the other."""
    replicas = range(place.first_replica, place.first_replica + place.local_replicas)
    if len(replicas) == 1:
        (only,) = replicas
        return batches.map(lambda *batch: share(*batch, only), _PARALLEL, deterministic=True)
    repeated = batches.flat_map(
        lambda *batch: tf.data.Dataset.range(replicas.start, replicas.stop).map(
            lambda replica: (*batch, replica)
        )
    )
    return repeated.map(share, _PARALLEL, deterministic=True)


def _check(batch: Any) -> Tensor:
    """Boils the first and last row of every dense leaf down to `Share.check`."""
    sums = tf.zeros([4])
    for leaf in tf.nest.flatten(batch):
        if isinstance(leaf, tf.Tensor) and leaf.dtype.is_numeric:
            ends = tf.cast(tf.reshape(tf.stack([leaf[0], leaf[-1]]), [-1]), tf.float32)
            position = tf.range(tf.size(ends), dtype=tf.float32)
            factors = tf.sin(position[:, None] * [1.1, 1.7, 2.3, 3.1] + [1.0, 2.0, 3.0, 4.0])
            sums += tf.reduce_sum(
                tf.where(tf.math.is_finite(ends), ends, 0.0)[:, None] * factors, 0
            )
    # The low bits of a float are the ones that differ.
    return tf.cast(tf.bitwise.bitwise_and(tf.bitcast(sums, tf.int32), 63), tf.float32)


def _slice(leaf: Tensor, begin: Tensor, end: Tensor) -> Tensor:
    if isinstance(leaf, tf.SparseTensor):
        size = tf.concat([[end - begin], tf.shape(leaf, tf.int64)[1:]], 0)
        start = tf.concat([[begin], tf.zeros_like(size[1:])], 0)
        return tf.sparse.slice(leaf, start, size)
    return leaf[begin:end]


class DatasetBatches(Batches):
    """A `tf.data.Dataset` of global batches.

    Args:
        dataset: Yields what `Share.data` holds.
        steps: Batches an epoch, or None to take its length.
        continues: Whether an epoch goes on where the one before stopped.
        transform: Applied to each batch.
    """

    def __init__(
        self,
        dataset: Any,
        steps: int | None,
        *,
        continues: bool,
        transform: Callable[[Any], Any] | None = None,
    ) -> None:
        length = int(dataset.cardinality())
        if length == 0:
            raise ArgumentError(
                "A data set must have at least one batch. Received: a tf.data.Dataset of "
                "length 0. Check the filter or the path that produced it."
            )
        known = length if length > 0 else None
        super().__init__(steps or known, transform)
        self.dataset = dataset
        self._continues = continues and steps is not None

    @property
    def continues(self) -> bool:
        """Whether one stream runs through all epochs."""
        return self._continues

    def batches(self, epoch: int) -> Any:
        """Gives the dataset."""
        return self.dataset

    def spec(self) -> Any:
        """Gives the shapes and dtypes of a batch."""
        spec = self.dataset.element_spec
        return spec if self.transform is None else _transformed(self.transform, spec)


class GeneratorBatches(Batches):
    """A Python generator of global batches; it can be read once.

    Args:
        generator: Yields what `Share.data` holds.
        steps: Batches an epoch, or None when it ends by itself.
    """

    def __init__(self, generator: Iterator[Any], steps: int | None) -> None:
        super().__init__(steps)
        try:
            self._first = _as_batch(next(generator))
        except StopIteration:
            raise ArgumentError(
                "A generator must yield at least one batch. Received: one that ends at once. "
                "Generators are read once: make a new one for each call."
            ) from None
        self._rest = itertools.chain([self._first], map(_as_batch, generator))

    @property
    def continues(self) -> bool:
        """Whether one stream runs through all epochs."""
        return self.steps is not None

    def batches(self, epoch: int) -> Any:
        """Wraps what is left of the generator."""
        return tf.data.Dataset.from_generator(lambda: self._rest, output_signature=self.spec())

    def spec(self) -> Any:
        """Gives the shapes and dtypes of a batch."""
        return tf.nest.map_structure(_batch_spec, self._first)


class PyDatasetBatches(Batches):
    """A `keras.utils.PyDataset`: batches by number, in threads, shuffled when asked.

    Args:
        dataset: Every worker computes every batch and takes its slice.
        steps: Batches an epoch, or None for all.
        shuffle: Whether batches come in another order each epoch.
        seed: Chooses the orders.
        transform: Applied to each batch.
    """

    def __init__(
        self,
        dataset: Any,
        steps: int | None,
        *,
        shuffle: bool,
        seed: int,
        transform: Callable[[Any], Any] | None = None,
    ) -> None:
        length = dataset.num_batches
        if length == 0:
            raise ArgumentError(
                "A data set must have at least one batch. Received: a PyDataset of length 0."
            )
        super().__init__(steps or length, transform)
        self.dataset = dataset
        self.length = length
        self.shuffle = shuffle and length is not None
        self.seed = seed
        self._spec = tf.nest.map_structure(_batch_spec, _as_batch(dataset[0]))

    def on_epoch_end(self) -> None:
        """Lets the data set rearrange itself, as Keras does."""
        self.dataset.on_epoch_end()

    def batches(self, epoch: int) -> Any:
        """Builds the stream of an epoch."""
        specs = tf.nest.flatten(self._spec)

        def load(position: np.int64) -> list[Any]:
            batch = _as_batch(self.dataset[self._number(int(position), epoch)])
            pairs = zip(tf.nest.flatten(batch), specs, strict=True)
            return [np.asarray(leaf, spec.dtype.as_numpy_dtype) for leaf, spec in pairs]

        def batch(position: Tensor) -> Any:
            loaded = tf.numpy_function(load, [position], [spec.dtype for spec in specs])
            for leaf, spec in zip(loaded, specs, strict=True):
                leaf.set_shape(spec.shape)
            return tf.nest.pack_sequence_as(self._spec, loaded)

        numbers = tf.data.Dataset.range(self.steps if self.steps is not None else _FOREVER)
        return numbers.map(batch, max(1, self.dataset.workers), deterministic=True)

    def _number(self, position: int, epoch: int) -> int:
        """Gives the number of the batch at a position of an epoch."""
        if self.length is None:
            return position
        rounds, inside = divmod(position, self.length)
        if not self.shuffle:
            return int(inside)
        order = permute(np.array([inside]), self.length, (self.seed, epoch + rounds))
        return int(order[0])

    def spec(self) -> Any:
        """Gives the shapes and dtypes of a batch."""
        if self.transform is None:
            return self._spec
        return _transformed(self.transform, self._spec)


def _transformed(transform: Callable[..., Any], spec: Any) -> Any:
    leaves = spec if isinstance(spec, tuple) else (spec,)
    return tf.function(transform).get_concrete_function(*leaves).structured_outputs


def _as_batch(value: Any) -> Any:
    """Makes NumPy arrays of what a generator or PyDataset gives, floats to `floatx()`."""
    if isinstance(value, dict):
        return {key: _as_batch(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        # (x, y, None) means (x, y), as it does in Keras.
        return tuple(_as_batch(item) for item in value if item is not None)
    array = np.asarray(value)
    return array.astype(keras.config.floatx()) if array.dtype.kind == "f" else array


def _batch_spec(leaf: Any) -> Any:
    return tf.TensorSpec((None, *leaf.shape[1:]), leaf.dtype)


# --- choosing the road ----------------------------------------------------------------


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
        f"Received: x={_short(x)} (of type {kind})."
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
    steps = settings.steps or settings.sampler.steps_per_epoch(num_rows, int(batch_size))
    if not settings.training:
        steps = min(steps, settings.sampler.steps_per_epoch(num_rows, int(batch_size)))
    return Arrays(
        data, settings.sampler, int(batch_size), settings.seed, steps, settings.training
    )


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
                f"Received: y={_short(y)}, sample_weight={_short(given)}."
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


def split(x: Any, y: Any, sample_weight: Any, fraction: float) -> tuple[Any, Any]:
    """Cuts the last rows off for validation, as Keras does.

    Args:
        x: Arrays.
        y: Targets, or None.
        sample_weight: Weights, or None.
        fraction: The part to cut off, between 0 and 1.

    Returns:
        `(x, y, sample_weight)` to train on, and the same to validate on.

    Raises:
        ArgumentError: The input is not arrays, or a part would be empty.
    """
    if not is_arrays(x):
        raise ArgumentError(
            "`validation_split` needs arrays. Received: x of type "
            f"{type(x).__name__}. Pass validation_data instead."
        )
    columns = [
        None if c is None else to_tensors(c, n)
        for c, n in ((x, "x"), (y, "y"), (sample_weight, "sample_weight"))
    ]
    rows = count_rows(x=columns[0], y=columns[1], sample_weight=columns[2])
    at = int(rows * (1.0 - fraction))
    if not 0 < at < rows:
        raise ArgumentError(
            "`validation_split` must leave examples to train and to validate on. "
            f"Received: validation_split={fraction} with {rows} examples."
        )

    def part(rows: slice) -> Any:
        return tuple(
            c if c is None else tf.nest.map_structure(lambda leaf: leaf[rows], c)
            for c in columns
        )

    return part(slice(0, at)), part(slice(at, rows))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# --- the loop's side ------------------------------------------------------------------


class Stream:
    """What Keras's loop iterates over: one iteration is an epoch.

    Args:
        source: The data.
        strategy: Deals shares out to replicas.
        first_epoch: Called when the first share is drawn: epochs drawn in earlier runs.
    """

    def __init__(
        self, source: Source, strategy: Strategy, first_epoch: Callable[[], int] = lambda: 0
    ) -> None:
        self.source = source
        self.strategy = strategy
        self.first_epoch = first_epoch
        self.drawn = False
        self._epoch: int | None = None
        self._running: Any = None

    def __iter__(self) -> Epoch:
        return Epoch(self, self.source.steps)

    def start_epoch(self) -> Any:
        """Gives an iterator over shares that stands at the beginning of the next epoch."""
        self._epoch = self.first_epoch() if self._epoch is None else self._epoch + 1
        if self._running is None or not self.source.continues:
            epoch = self._epoch
            place = self.strategy.place
            shares = self.strategy.distribute(lambda: self.source.shares(place, epoch))
            self._running = iter(shares)
        return self._running


class Epoch:
    """One epoch's shares; begins when the first is drawn, since Keras makes more than it uses.

    Args:
        stream: Where they come from.
        steps: How many there are, or None when only the data knows.
    """

    def __init__(self, stream: Stream, steps: int | None) -> None:
        self._stream = stream
        self._left = steps
        self._iterator: Any = None

    @property
    def iterator(self) -> Any:
        """The iterator that traced functions draw from."""
        if self._iterator is None:
            self._iterator = self._stream.start_epoch()
        return self._iterator

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """Wraps the drawing of steps, to tell data that never began from data that ended."""
        try:
            yield
        except tf.errors.OutOfRangeError:
            if not self._stream.drawn:
                raise ArgumentError(
                    "A data set must have at least one batch. Received: one that ends at "
                    "once. Check the filter or the path that produced it."
                ) from None
            raise
        self._stream.drawn = True

    def take(self, wanted: int) -> int:
        """Says how many steps may be drawn now.

        Args:
            wanted: At most so many.

        Raises:
            StopIteration: The epoch is over.
        """
        if self._left is None:
            return wanted
        taken = min(wanted, self._left)
        if taken == 0:
            raise StopIteration
        self._left -= taken
        return taken

    def __iter__(self) -> Epoch:
        return self

    def __next__(self) -> Any:
        self.take(1)
        return next(self.iterator)
