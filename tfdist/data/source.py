"""The base class of data sources, and the functions that split batches over replicas."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np
import tensorflow as tf

from tfdist.data.epochs import START, DataPosition
from tfdist.samplers.permutation import Rows
from tfdist.strategies.base import Place

Tensor = Any
PARALLEL = tf.data.AUTOTUNE
FOREVER = 2**62
FEW = 8  # rows of a sample, and the size of its other variable dimensions
Function = TypeVar("Function", bound=Callable[..., Any])


class Share(NamedTuple):
    """The per-replica batch: one replica's part of a global batch.

    With a single replica only `data` is set.

    Attributes:
        data: The input of Keras's steps: `x`, `(x, y)` or `(x, y, sample_weight)`, with at
            least one row.
        rows: Scalar int64, the rows that count; 0 if the only row is padding.
        total: Scalar int64, the rows of the global batch.
        offset: Scalar int64, the row of the global batch at which the share begins.
        check: float32 of shape [4], whole numbers below 64 that differ if global batches
            differ. Workers compare them at every step. Arrays are compared before training.
        groups: int64 of shape [rows in `data`], the group of each row in the sampler's
            `group_of`; of shape [0] if there are no groups.
    """

    data: Any
    rows: Tensor = None
    total: Tensor = None
    offset: Tensor = None
    check: Tensor = None
    groups: Tensor = None


def no_groups() -> Tensor:
    """Returns `Share.groups` for rows without groups; not every iterator accepts None."""
    return tf.zeros([0], tf.int64)


def bounds(total: Tensor, replica: Tensor, place: Place) -> tuple[Tensor, Tensor]:
    """Returns the range of a replica's rows in a global batch.

    Args:
        total: Rows of the global batch.
        replica: The replica's global number.
        place: The number of replicas.

    Returns:
        The first row and the row after the last one.
    """
    # Neighbouring shares meet, also where the rows do not divide: each bound is rounded down
    # from the same product. So sizes differ by one at most.
    share, shares = place.share_of(replica), place.num_shares
    return total * share // shares, total * (share + 1) // shares


def rows_per_replica(total: int | None, place: Place) -> int | None:
    """Returns the rows of each replica in a global batch; None if they are not equal.

    Args:
        total: Rows of the global batch, or None if unknown.
        place: The number of replicas.
    """
    if total is None or total % place.num_shares:
        return None
    return total // place.num_shares


def bounds_of_groups(groups: Tensor, replica: Tensor, place: Place) -> tuple[Tensor, Tensor]:
    """Returns the range of a replica's rows in a global batch without splitting a group.

    Args:
        groups: The group of each row, shape [total]; a group's rows are adjacent.
        replica: The replica's global number.
        place: The number of replicas.

    Returns:
        The first row and the row after the last one.
    """
    begins = tf.where(groups[1:] != groups[:-1])[:, 0] + 1
    edges = tf.concat([[0], begins, [tf.size(groups, tf.int64)]], 0)
    first, last = bounds(tf.size(begins, tf.int64) + 1, replica, place)
    return edges[first], edges[last]


class Source(abc.ABC):
    """A data source: global batches that can be split over replicas.

    Attributes:
        batches: Global batches of one pass over the data; None if unknown or endless.
        requested_steps: The user's number of global batches an epoch, or None.
        repeatable: Whether batches can be drawn a second time.
        may_be_empty: Whether a global batch may have no rows. Then `Share.rows` is set for a
            single replica too.
        spans_passes: Whether the stream of one pass goes on with the next pass.
        is_same_each_pass: Whether the streams of all passes are equal.
        copies: How often each row comes in a share, one copy after the other.
    """

    batches: int | None
    requested_steps: int | None = None
    repeatable: bool = True
    may_be_empty: bool = False
    spans_passes: bool = False
    is_same_each_pass: bool = False
    copies: int = 1

    @property
    def steps(self) -> int | None:
        """Global batches in an epoch, or None when unknown."""
        return self.requested_steps or self.batches

    @abc.abstractmethod
    def shares(self, place: Place, position: DataPosition = START) -> Any:
        """Builds the stream of the local replicas' shares, from a position on.

        Args:
            place: The replicas of this process.
            position: The position of the first batch.

        Returns:
            A `tf.data.Dataset` of `Share`, `place.local_replicas` elements a step.
        """

    def position_after(self, steps: int) -> DataPosition:
        """Returns the position at which a new call of `fit` begins.

        Args:
            steps: Steps of the optimizer, in all calls so far.
        """
        return DataPosition(number=-(-steps // self.steps) if self.steps else 0)

    def begin_anew(self) -> None:  # noqa: B027, most draw by number
        """Called before the data is drawn again from an earlier position."""

    def suspects(self) -> list[str]:
        """Returns what could make the data differ between workers, a few words each."""
        return []

    def note_iterator(self, position: DataPosition) -> None:  # noqa: B027, most need nothing
        """Called before an iterator over the stream of `shares` is made.

        Args:
            position: The position at which the iterator begins.
        """

    def finish(self, position: DataPosition) -> None:  # noqa: B027
        """Called at the end of a call of `fit` or `evaluate`.

        Args:
            position: The position in the data.
        """

    def sample(self, rows: int = FEW) -> Any:
        """Returns a batch, or random data of its shape, without drawing from the data.

        Args:
            rows: The most rows. A batch that the source has already may have more.

        Returns:
            Tensors in the structure of a batch; None if that is not possible.
        """
        random = np.random.default_rng(0)

        def random_tensor(spec: Any) -> Tensor:
            if isinstance(spec, tf.TypeSpec) and not isinstance(spec, tf.TensorSpec):
                raise TypeError
            shape = [FEW if size is None else size for size in spec.shape]
            if shape and spec.shape[0] is None:
                shape[0] = rows
            if tf.as_dtype(spec.dtype) == tf.string:
                return tf.fill(shape, "a")
            # Between 0 and 1, a float is valid as a probability too. A whole number becomes 0
            # or 1, which every table of classes or words has.
            numbers = random.uniform(0.05, 0.95, shape)
            is_float = tf.as_dtype(spec.dtype).is_floating
            return tf.cast(numbers if is_float else numbers > 0.5, spec.dtype)

        try:
            return tf.nest.map_structure(random_tensor, self.spec())
        except TypeError:  # ragged or sparse
            return None

    @property
    def columns(self) -> Any:
        """Tensors from which any rows can be gathered, in the structure of a batch, or None."""
        return None

    @property
    def common_data(self) -> Any:
        """The data that every worker has, in the structure of a batch, or None."""
        return None

    def row_numbers(self, position: DataPosition) -> Iterator[Rows]:
        """Returns the global batches as numbers of rows in `columns`.

        Args:
            position: As in `shares`.

        Returns:
            An endless iterator over int64 arrays of shape [rows].
        """
        raise NotImplementedError

    @abc.abstractmethod
    def spec(self) -> Any:
        """Returns the structure of a batch, with leaves that have `shape` and `dtype`."""

    def fingerprint(self) -> str:
        """Returns a text that must be equal on all workers before the first step."""
        return self.spec_text()

    def spec_text(self) -> str:
        """Returns the structure of a batch as text."""
        return as_text(self.spec())

    @property
    def drawn_from(self) -> Source:
        """The source that draws the examples; another one if this source only changes them."""
        return self

    def report(self) -> str | None:
        """Returns a text about the data that the user sees before training, or None."""
        return None

    def go_on_after(self, epochs: int) -> None:  # noqa: B027, most know by `epoch`
        """Tells the data how many epochs an earlier process has drawn.

        Args:
            epochs: Whole epochs of this `fit`.
        """

    def on_epoch_end(self) -> None:  # noqa: B027, most sources need nothing
        """Called when an epoch's stream has ended."""


def as_text(spec: Any) -> str:
    """Returns a structure of shapes and dtypes as text.

    Args:
        spec: The structure that `Source.spec` returns.
    """
    return str(tf.nest.map_structure(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", spec))


def split_over_replicas(batches: Any, share: Callable[..., Share], place: Place) -> Any:
    """Maps each batch to the shares of the local replicas, one after the other."""
    replicas = range(place.first_replica, place.first_replica + place.local_replicas)
    if len(replicas) == 1:
        (only,) = replicas
        return map_elements(batches, lambda *batch: share(*batch, only)).prefetch(PARALLEL)

    @without_autograph
    def repeat(*batch: Any) -> Any:
        numbers = tf.data.Dataset.range(replicas.start, replicas.stop)
        return numbers.map(lambda replica: (*batch, replica))

    return map_elements(batches.flat_map(repeat), share).prefetch(PARALLEL)


def without_autograph(function: Function) -> Function:
    """Prevents AutoGraph from rewriting a function: that takes longer than tracing it.

    Args:
        function: A function of a pipeline, without a Python condition on a tensor.
    """
    wrapped: Function = tf.autograph.experimental.do_not_convert(function)
    return wrapped


def map_elements(dataset: Any, function: Callable[..., Any]) -> Any:
    """Applies a function to each element, several at once, in their order.

    Args:
        dataset: A `tf.data.Dataset`.
        function: As in `without_autograph`.
    """
    return dataset.map(without_autograph(function), PARALLEL, deterministic=True)


def without_tuning(dataset: Any) -> Any:
    """Switches off TensorFlow's optimizations of a pipeline.

    They gain nothing here, and cost time and threads. It may take up to a minute to free a
    pipeline that TensorFlow tunes: see docs/decisions/0011-untuned-pipelines.md.

    Args:
        dataset: A `tf.data.Dataset`; no part of it may be a user's.
    """
    options = tf.data.Options()
    options.experimental_optimization.apply_default_optimizations = False
    options.autotune.enabled = False
    return dataset.with_options(options)


def shortened(value: Any) -> str:
    """Returns a value's repr for a message, cut to a line.

    Args:
        value: Anything.
    """
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
