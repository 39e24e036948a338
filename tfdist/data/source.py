"""What all data has in common: it can be dealt out to replicas in shares."""

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
FEW = 8  # rows of a sample, and whatever else has no fixed size
Function = TypeVar("Function", bound=Callable[..., Any])


class Share(NamedTuple):
    """One replica's part of a global batch; a single replica needs nothing but the data.

    Attributes:
        data: What Keras's steps take: `x`, `(x, y)` or `(x, y, sample_weight)`, at least
            one row.
        rows: Scalar int64, rows that count: 0 when the only row is padding.
        total: Scalar int64, rows of the global batch.
        offset: Scalar int64, the row of the global batch at which the share begins.
        check: float32 of shape [4], whole numbers below 64 that differ when global batches
            differ. Workers compare them at every step; arrays are compared beforehand.
        groups: int64 of shape [rows in `data`], the sampler's `group_of` each; of shape [0]
            where it has none.
    """

    data: Any
    rows: Tensor = None
    total: Tensor = None
    offset: Tensor = None
    check: Tensor = None
    groups: Tensor = None


def no_groups() -> Tensor:
    """Gives `Share.groups` where rows have none; None would not go through every iterator."""
    return tf.zeros([0], tf.int64)


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
    return total * replica // replicas, total * (replica + 1) // replicas


def share_of(total: int | None, place: Place) -> int | None:
    """Says how many rows every replica has of a global batch, if all have equally many.

    Args:
        total: Rows of the global batch, if known.
        place: How many replicas there are.
    """
    if total is None or total % place.num_replicas:
        return None
    return total // place.num_replicas


def bounds_of_groups(groups: Tensor, replica: Tensor, place: Place) -> tuple[Tensor, Tensor]:
    """Says which rows of a global batch are a replica's, where groups stay whole.

    Args:
        groups: The group of each row, shape [total]; a group's rows follow each other.
        replica: The replica's global number.
        place: How many replicas there are.

    Returns:
        The first row and the one after the last.
    """
    begins = tf.where(groups[1:] != groups[:-1])[:, 0] + 1
    edges = tf.concat([[0], begins, [tf.size(groups, tf.int64)]], 0)
    first, last = bounds(tf.size(begins, tf.int64) + 1, replica, place)
    return edges[first], edges[last]


class Source(abc.ABC):
    """Data that can be dealt out in shares.

    Attributes:
        batches: Global batches of one pass over the data, or None when unknown or endless.
        asked_steps: Global batches an epoch, if the user has said.
        repeatable: Whether batches that were drawn can be drawn again.
        may_be_empty: Whether a global batch may have no rows; then a single replica's shares
            also say how many rows count.
        flows: Whether the stream of one pass goes on with the next one.
        repeats: Whether every pass's stream is built alike.
    """

    batches: int | None
    asked_steps: int | None = None
    repeatable: bool = True
    may_be_empty: bool = False
    flows: bool = False
    repeats: bool = False

    @property
    def steps(self) -> int | None:
        """Global batches in an epoch, or None when unknown."""
        return self.asked_steps or self.batches

    @abc.abstractmethod
    def shares(self, place: Place, position: DataPosition = START) -> Any:
        """Builds the stream of the local replicas' shares, from a position on.

        Args:
            place: Which replicas are local.
            position: Where it begins.

        Returns:
            A `tf.data.Dataset` of `Share`, `place.local_replicas` elements a step.
        """

    def position_after(self, steps: int) -> DataPosition:
        """Says where a new call of `fit` begins.

        Args:
            steps: That the optimizer has made, in earlier calls too.
        """
        return DataPosition(number=-(-steps // self.steps) if self.steps else 0)

    def begin_anew(self) -> None:  # noqa: B027, most draw by number
        """Called before data is drawn again that was drawn already, up to another position."""

    def suspects(self) -> list[str]:
        """Names what could make the data differ between workers, a few words each."""
        return []

    def note_iterator(self, position: DataPosition) -> None:  # noqa: B027, most need nothing
        """Called before an iterator over what `shares` gave is made.

        Args:
            position: Of the pass that it is for.
        """

    def finish(self, position: DataPosition) -> None:  # noqa: B027
        """Called when a call is over.

        Args:
            position: Where the data stands.
        """

    def sample(self, rows: int = FEW) -> Any:
        """Gives a batch, or one that looks like it, without drawing from the data.

        Args:
            rows: How many, at most; a batch that is at hand is given as it is.

        Returns:
            Tensors in the structure of a batch; None if there can be none.
        """
        random = np.random.default_rng(0)

        def made(spec: Any) -> Tensor:
            if isinstance(spec, tf.TypeSpec) and not isinstance(spec, tf.TensorSpec):
                raise TypeError
            shape = [FEW if size is None else size for size in spec.shape]
            if shape and spec.shape[0] is None:
                shape[0] = rows
            if tf.as_dtype(spec.dtype) == tf.string:
                return tf.fill(shape, "a")
            numbers = random.uniform(0.05, 0.95, shape)
            is_float = tf.as_dtype(spec.dtype).is_floating
            return tf.cast(numbers if is_float else numbers > 0.5, spec.dtype)

        try:
            return tf.nest.map_structure(made, self.spec())
        except TypeError:  # ragged or sparse
            return None

    @property
    def columns(self) -> Any:
        """Tensors of which any rows can be gathered, in the structure of a batch, or None."""
        return None

    @property
    def held(self) -> Any:
        """What every worker has of the data, in the structure of a batch, or None."""
        return None

    def row_numbers(self, position: DataPosition) -> Iterator[Rows]:
        """Gives the global batches as numbers of rows in `columns`.

        Args:
            position: As in `shares`.

        Returns:
            An iterator without end of int64 arrays of shape [rows].
        """
        raise NotImplementedError

    @abc.abstractmethod
    def spec(self) -> Any:
        """Gives the structure of a batch, with leaves that have `shape` and `dtype`."""

    def fingerprint(self) -> str:
        """Sums up what every worker must have alike before the first step."""
        return self.spec_text()

    def spec_text(self) -> str:
        """Writes the structure of a batch down."""
        return as_text(self.spec())

    @property
    def drawn_from(self) -> Source:
        """The source that draws: this one, unless it changes what another has drawn."""
        return self

    def report(self) -> str | None:
        """Says what a user should know of the data before training, or nothing."""
        return None

    def go_on_after(self, epochs: int) -> None:  # noqa: B027, most know by `epoch`
        """Tells data that rearranges itself what an earlier process has drawn of it.

        Args:
            epochs: Of this `fit`, whole ones.
        """

    def on_epoch_end(self) -> None:  # noqa: B027, most sources need nothing
        """Called when an epoch's stream has ended."""


def as_text(spec: Any) -> str:
    """Writes a structure of shapes and dtypes down.

    Args:
        spec: As `Source.spec` gives it.
    """
    return str(tf.nest.map_structure(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", spec))


def dealt(batches: Any, share: Callable[..., Share], place: Place) -> Any:
    """Makes the local replicas' shares of each batch, one after the other."""
    replicas = range(place.first_replica, place.first_replica + place.local_replicas)
    if len(replicas) == 1:
        (only,) = replicas
        return mapped(batches, lambda *batch: share(*batch, only)).prefetch(PARALLEL)

    @unconverted
    def repeat(*batch: Any) -> Any:
        numbers = tf.data.Dataset.range(replicas.start, replicas.stop)
        return numbers.map(lambda replica: (*batch, replica))

    return mapped(batches.flat_map(repeat), share).prefetch(PARALLEL)


def unconverted(function: Function) -> Function:
    """Keeps AutoGraph from rewriting a function, which takes longer than tracing it.

    Args:
        function: Of a pipeline, without a Python condition on a tensor.
    """
    kept: Function = tf.autograph.experimental.do_not_convert(function)
    return kept


def mapped(dataset: Any, function: Callable[..., Any]) -> Any:
    """Applies a function to each element, several at once, in their order.

    Args:
        dataset: A `tf.data.Dataset`.
        function: As in `unconverted`.
    """
    return dataset.map(unconverted(function), PARALLEL, deterministic=True)


def untuned(dataset: Any) -> Any:
    """Runs a pipeline as it is written.

    Rewriting its graph gains it nothing, and costs time and threads. One that TensorFlow tunes
    may take as long to free as it has lived, up to a minute: see
    docs/decisions/0011-untuned-pipelines.md.

    Args:
        dataset: A `tf.data.Dataset`, of which no part is a user's.
    """
    options = tf.data.Options()
    options.experimental_optimization.apply_default_optimizations = False
    options.autotune.enabled = False
    return dataset.with_options(options)


def shortened(value: Any) -> str:
    """Gives a value's repr for a message, cut to a line.

    Args:
        value: Anything.
    """
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
