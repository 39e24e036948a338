"""The share of a replica while its step is traced."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import tensorflow as tf

from tfdist._keras.keyed import RowKeys

Tensor = Any
"""A `tf.Tensor`, `tf.IndexedSlices`, or a value that converts to a tensor."""


class OptimizerUpdates(Protocol):
    """The interface between a replica's train step and its optimizers."""

    def scale(self, optimizer: Any, loss: Tensor) -> Tensor:
        """Changes the loss before its gradient is taken."""

    def apply(
        self,
        optimizer: Any,
        grads: list[Tensor],
        update: Callable[[list[Tensor]], None],
        variables: Sequence[Any],
    ) -> None:
        """Takes a replica's gradients. Calls `update` with reduced ones, now or later."""


class Metrics(Protocol):
    """The interface between a replica's step and its metrics."""

    def begin(self, variables: Sequence[Any]) -> None:
        """Takes the variables of a metric that is about to be updated."""


@dataclass
class ReplicaBatch:
    """One replica's share of a global batch, and a record of its step while it is traced.

    Attributes:
        rows: Scalar int64 tensor, number of examples of the share. If it is 0, the share has
            one padding row, which must contribute nothing.
        total: Scalar int64 tensor, number of examples of the global batch.
        offset: Scalar int64 tensor, index of the share's first row in the global batch.
        all_reduce: Sums a list of tensors over all replicas.
        all_gather: Concatenates a tensor of every replica along axis 0.
        updates: Receives the optimizers' updates while the train step runs.
        metrics: Receives the metrics that the step updates.
        keys: The rows' keys for random numbers, which replace their positions in the batch.
        is_traced: Whether the batch belongs to a graph.
        touched: `keras.Variable`s that the step has assigned, with their former values, by
            id. Variables of `metrics` and those that optimizers update are not in it.
        updated: `keras.Variable`s that optimizers have assigned, by id.
        losses: The losses that each layer has added, by the layer's id.
        of_metrics: The `keras.Variable`s that `metrics` has received, by id.
        by_value: The ids of variables that were assigned outside of `seeding`.
        is_seeding: Whether assignments are within `seeding`.
        reads: The whole values of weights in parts that the step has read, by the id of the
            weight's backing.
        gathered: Those of them that can be used again.
        own_reads: As `reads`, but this replica's own parts, with which layers in parts
            compute.
        team: The `Team` of the replicas that compute layers together, if the step has one.
        columns: The `Columns` in which a layer computes now, if it has only some of them.
        cut_outputs: The ids of layers whose last output has only this replica's columns.
        is_weighed: Whether all gradients that are taken now are parts of the global gradient,
            which is their sum over all replicas.
    """

    rows: Tensor
    total: Tensor
    offset: Tensor
    all_reduce: Callable[[Sequence[Tensor]], list[Tensor]]
    all_gather: Callable[[Tensor], Tensor]
    updates: OptimizerUpdates | None = None
    metrics: Metrics | None = None
    keys: RowKeys | None = None
    touched: dict[int, tuple[Any, Tensor]] = field(default_factory=dict, init=False)
    updated: dict[int, Any] = field(default_factory=dict, init=False)
    losses: dict[int, list[Tensor]] = field(default_factory=dict, init=False)
    by_value: set[int] = field(default_factory=set, init=False)
    is_updating: bool = field(default=False, init=False)
    is_seeding: bool = field(default=False, init=False)
    reads: dict[int, list[Tensor]] = field(default_factory=dict, init=False)
    gathered: dict[int, Tensor] = field(default_factory=dict, init=False)
    is_weighed: bool = field(default=False, init=False)
    own_reads: dict[int, list[Tensor]] = field(default_factory=dict, init=False)
    team: Any = field(default=None, init=False)
    columns: Any = field(default=None, init=False)
    cut_outputs: set[int] = field(default_factory=set, init=False)
    _results: dict[int, tuple[Tensor, Any, int]] = field(default_factory=dict, init=False)
    _whole: dict[int, Tensor] = field(default_factory=dict, init=False)
    of_metrics: dict[int, Any] = field(default_factory=dict, init=False)
    _graph: Any = field(default_factory=tf.compat.v1.get_default_graph, init=False)
    is_traced: bool = field(default_factory=lambda: not tf.executing_eagerly(), init=False)

    @property
    def has_rows(self) -> Tensor:
        """Scalar bool tensor: whether the share has examples."""
        return self.rows > 0

    @property
    def is_shared(self) -> bool:
        """Whether the results of this step are summed over replicas."""
        return self.metrics is not None

    @property
    def share(self) -> Tensor:
        """Scalar float32 tensor: the share's fraction of the global batch, from 0 to 1.

        It is 0 when the global batch is empty.
        """
        return self.share_as(tf.float32)

    def share_as(self, dtype: Any) -> Tensor:
        """Returns `share` in a dtype; for float64 it is not rounded to float32 first.

        Args:
            dtype: A floating-point dtype.
        """
        return _quotient(self.rows, self.total, dtype)

    def inverse_share_as(self, dtype: Any) -> Tensor:
        """Returns 1 / `share` in a dtype, and 0 without examples.

        Args:
            dtype: A floating-point dtype.
        """
        return _quotient(self.total, self.rows, dtype)

    def gather(self, rows: Tensor) -> Tensor:
        """Gathers the rows of the global batch from those of the shares.

        Every replica computes the same values from them. So the gradient is cut to the rows
        of the share, and scaled such that the sum over replicas is the gradient of the batch.

        Args:
            rows: Shape [rows of the share, ...].
        """

        @tf.custom_gradient  # type: ignore[untyped-decorator]
        def gathered(share: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
            def gradient(upstream: Tensor) -> Tensor:
                of_share = upstream[self.offset : self.offset + self.rows]
                padding = tf.shape(share)[0] - tf.cast(self.rows, tf.int32)
                paddings = [[0, padding], *([[0, 0]] * (len(share.shape) - 1))]
                of_share = tf.pad(of_share, paddings)
                return of_share * self.inverse_share_as(of_share.dtype)

            return self.all_gather(share[: self.rows]), gradient

        # Integers, such as targets, have no gradient.
        return gathered(rows) if rows.dtype.is_floating else self.all_gather(rows[: self.rows])

    def note_whole(self, value: Tensor) -> None:
        """Records a value that is computed of the whole batch, equal on every replica.

        Args:
            value: A tensor.
        """
        self._whole[id(value)] = value

    def is_whole(self, value: Tensor) -> bool:
        """Returns whether `note_whole` has recorded a value.

        Args:
            value: Any value.
        """
        return self._whole.get(id(value)) is value

    def of_whole(self, compute: Callable[[], Any]) -> Any:
        """Computes a value of the share. `probe` overrides this to use the whole sample.

        Args:
            compute: Computes the value.
        """
        return compute()

    @contextlib.contextmanager
    def updating(self) -> Iterator[None]:
        """Makes a context in which updates of optimizers are not intercepted."""
        before, self.is_updating = self.is_updating, True
        try:
            yield
        finally:
            self.is_updating = before

    def touch(self, variable: Any) -> None:
        """Records the value of a `keras.Variable` that is about to be assigned.

        Args:
            variable: The `keras.Variable`.
        """
        key = id(variable)
        if self.is_updating:
            self.updated[key] = variable
            return
        if not self.is_seeding:
            self.by_value.add(key)
        if key in self.touched or key in self.of_metrics:
            return
        # If a branch assigns it, the value is read outside of the branch.
        with self.outermost():
            self.touched[key] = variable, tf.identity(variable._value)

    @property
    def is_outermost(self) -> bool:
        """Whether the step's own graph is traced, not that of a branch or loop."""
        return tf.executing_eagerly() or tf.compat.v1.get_default_graph() is self._graph

    @contextlib.contextmanager
    def outermost(self, check: Callable[[Any], None] | None = None) -> Iterator[None]:
        """Makes a context of the step's own graph, also while a branch or loop is traced.

        Args:
            check: Called with the graph that is being traced, if it is another one.
        """
        if self.is_outermost:
            yield
            return
        if check is not None:
            check(tf.compat.v1.get_default_graph())
        with self._graph.as_default():
            yield

    def begin_metric(self, metric: Any) -> None:
        """Records a metric that is about to be updated, if `metrics` is set.

        Args:
            metric: The metric.
        """
        if self.metrics is not None:
            variables = metric.variables
            self.of_metrics.update({id(variable): variable for variable in variables})
            self.metrics.begin(variables)

    def note_result(self, metric: Any, value: Any) -> None:
        """Records the result of a metric.

        Args:
            metric: The metric.
            value: The tensor or nested tensors that its `result` returned.
        """
        for number, leaf in enumerate(tf.nest.flatten(value)):
            self._results.setdefault(id(leaf), (leaf, metric, number))

    def metric_of(self, value: Any) -> tuple[Any, int] | None:
        """Finds the metric whose result a value is.

        Args:
            value: Any value.

        Returns:
            The metric and the index of the value among the tensors of its result, or None.
        """
        if type(value) is float:
            # Without a graph, Keras 3.12 returns numbers in the place of results.
            equal = (r for r in self._results.values() if _is_number(r[0], value))
            record = next(equal, None)
            return None if record is None else record[1:]
        record = self._results.get(id(value))
        # By identity, not by id alone: a tensor that is gone may have had the same id.
        return None if record is None or record[0] is not value else record[1:]


_current = threading.local()


def current_batch() -> ReplicaBatch | None:
    batch: ReplicaBatch | None = getattr(_current, "batch", None)
    # While a step is traced, variables are created eagerly. They belong to no replica.
    if batch is not None and batch.is_traced and tf.executing_eagerly():
        return None
    return batch


@contextlib.contextmanager
def seeding() -> Iterator[None]:
    """Makes a context in which seeds advance, or get an earlier value back.

    Neither keeps anything of the examples.
    """
    batch = current_batch()
    before = None if batch is None else batch.is_seeding
    if batch is not None:
        batch.is_seeding = True
    try:
        yield
    finally:
        if batch is not None:
            batch.is_seeding = bool(before)


@contextlib.contextmanager
def on_replica(batch: Any) -> Iterator[Any]:
    """Makes `batch` the current batch of this thread, for the functions of `replicated()`.

    Args:
        batch: The replica's `ReplicaBatch`, or None outside of a replica's step.
            tf.distribute traces each replica in a thread of its own.

    Yields:
        `batch`.
    """
    before = getattr(_current, "batch", None)
    _current.batch = batch
    try:
        yield batch
    finally:
        _current.batch = before


def _quotient(part: Tensor, whole: Tensor, dtype: Any) -> Tensor:
    wide = tf.float64 if tf.as_dtype(dtype) == tf.float64 else tf.float32
    return tf.cast(tf.math.divide_no_nan(tf.cast(part, wide), tf.cast(whole, wide)), dtype)


def _is_number(result: Any, number: float) -> bool:
    """Returns whether a result that was computed without a graph is a number, or both NaN."""
    if not hasattr(result, "numpy") or result.shape.rank != 0:
        return False
    value = float(result)
    return value == number or (value != value and number != number)
