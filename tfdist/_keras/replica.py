"""What a replica knows of its share while its step is traced."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import tensorflow as tf

from tfdist._keras.keyed import RowKeys

Tensor = Any
"""A `tf.Tensor`, `tf.IndexedSlices` or what converts to one."""


class OptimizerUpdates(Protocol):
    """What stands between a replica's train step and its optimizers."""

    def scale(self, optimizer: Any, loss: Tensor) -> Tensor:
        """Changes the loss before its gradient is taken."""

    def apply(
        self,
        optimizer: Any,
        grads: list[Tensor],
        update: Callable[[list[Tensor]], None],
        variables: Sequence[Any],
    ) -> None:
        """Takes a replica's gradients; sooner or later calls `update` with reduced ones."""


class Metrics(Protocol):
    """What stands between a replica's step and the metrics it updates."""

    def begin(self, variables: Sequence[Any]) -> None:
        """Takes the variables of a metric that is about to be updated."""


@dataclass
class ReplicaBatch:
    """What one replica knows, while a step is traced, about its share of a global batch.

    Attributes:
        rows: Scalar int64 tensor, the examples of this replica's share. At 0 the share
            holds one padding row, which must contribute nothing.
        total: Scalar int64 tensor, the examples of the global batch.
        offset: Scalar int64 tensor, the global batch's row at which the share begins.
        all_reduce: Sums a list of tensors over all replicas.
        all_gather: Concatenates a tensor of every replica along axis 0.
        updates: Receives what the train step does with optimizers, while it runs.
        metrics: Receives the metrics that the step updates, while it runs.
        keys: What random numbers of rows follow from, in place of their place in the batch.
        is_traced: Whether it is part of a graph.
        touched: `keras.Variable`s assigned so far, with the value before, by their id; but
            for those of `metrics` and what optimizers update.
        updated: `keras.Variable`s that optimizers assigned as such, by their id.
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
    is_updating: bool = field(default=False, init=False)
    _results: dict[int, tuple[Tensor, Any, int]] = field(default_factory=dict, init=False)
    _whole: dict[int, Tensor] = field(default_factory=dict, init=False)
    _of_metrics: set[int] = field(default_factory=set, init=False)
    _graph: Any = field(default_factory=tf.compat.v1.get_default_graph, init=False)
    is_traced: bool = field(default_factory=lambda: not tf.executing_eagerly(), init=False)

    @property
    def has_rows(self) -> Tensor:
        """Scalar bool tensor: whether the share holds examples."""
        return self.rows > 0

    @property
    def is_shared(self) -> bool:
        """Whether a step runs that sums up what replicas come to."""
        return self.metrics is not None

    @property
    def share(self) -> Tensor:
        """Scalar float32 tensor: the share's part of the global batch, from 0 to 1.

        It is 0 when the global batch is empty.
        """
        return tf.math.divide_no_nan(
            tf.cast(self.rows, tf.float32), tf.cast(self.total, tf.float32)
        )

    @property
    def inverse_share(self) -> Tensor:
        """Scalar float32 tensor: 1 / `share`, and 0 without examples."""
        return tf.math.divide_no_nan(
            tf.cast(self.total, tf.float32), tf.cast(self.rows, tf.float32)
        )

    def gather(self, rows: Tensor) -> Tensor:
        """Gives the rows of the global batch, from those of the share.

        What is computed of them is the same on every replica. So the gradient that comes back
        is the share's part of it, and is made such that replicas' sums are the whole.

        Args:
            rows: Shape [rows of the share, ...].
        """

        @tf.custom_gradient  # type: ignore[untyped-decorator]
        def gathered(share: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
            def gradient(upstream: Tensor) -> Tensor:
                own = upstream[self.offset : self.offset + self.rows]
                padding = tf.shape(share)[0] - tf.cast(self.rows, tf.int32)
                own = tf.pad(own, [[0, padding], *([[0, 0]] * (len(share.shape) - 1))])
                return own * tf.cast(self.inverse_share, own.dtype)

            return self.all_gather(share[: self.rows]), gradient

        # What cannot be differentiated keeps its dtype: targets may be integers.
        return gathered(rows) if rows.dtype.is_floating else self.all_gather(rows[: self.rows])

    def note_whole(self, value: Tensor) -> None:
        """Notes what was computed of the whole batch, the same on every replica.

        Args:
            value: A tensor.
        """
        self._whole[id(value)] = value

    def is_whole(self, value: Tensor) -> bool:
        """Tells whether a value was noted by `note_whole`.

        Args:
            value: Anything.
        """
        return self._whole.get(id(value)) is value

    def of_whole(self, compute: Callable[[], Any]) -> Any:
        """Gives what is computed of a share as it is; see `probe`.

        Args:
            compute: Computes it.
        """
        return compute()

    @contextlib.contextmanager
    def updating(self) -> Iterator[None]:
        """Makes a context in which optimizers are not intercepted."""
        before, self.is_updating = self.is_updating, True
        try:
            yield
        finally:
            self.is_updating = before

    def touch(self, variable: Any) -> None:
        """Notes that a `keras.Variable` is about to be assigned, and what it holds.

        Args:
            variable: The `keras.Variable`.
        """
        key = id(variable)
        if self.is_updating:
            self.updated[key] = variable
            return
        if key in self.touched or key in self._of_metrics:
            return
        # Where a branch assigns it, the value is read before the branch.
        with contextlib.nullcontext() if tf.executing_eagerly() else self._graph.as_default():
            self.touched[key] = variable, tf.identity(variable._value)

    def begin_metric(self, metric: Any) -> None:
        """Notes that a metric is about to be updated, if somebody wants to know.

        Args:
            metric: The metric.
        """
        if self.metrics is not None:
            variables = metric.variables
            self._of_metrics.update(id(variable) for variable in variables)
            self.metrics.begin(variables)

    def note_result(self, metric: Any, value: Any) -> None:
        """Notes what a metric's `result` gave.

        Args:
            metric: The metric.
            value: A tensor, or several.
        """
        for number, leaf in enumerate(tf.nest.flatten(value)):
            self._results.setdefault(id(leaf), (leaf, metric, number))

    def metric_of(self, value: Any) -> tuple[Any, int] | None:
        """Tells which metric's `result` a value is, and which of its tensors.

        Args:
            value: Anything.
        """
        known = self._results.get(id(value))
        return None if known is None or known[0] is not value else known[1:]


_current = threading.local()


def current_batch() -> ReplicaBatch | None:
    batch: ReplicaBatch | None = getattr(_current, "batch", None)
    # Variables are made outside of a step that is traced, and are no replica's.
    if batch is not None and batch.is_traced and tf.executing_eagerly():
        return None
    return batch


@contextlib.contextmanager
def on_replica(batch: Any) -> Iterator[Any]:
    """Makes `batch` what Keras's functions see in this thread, within `replicated()`.

    Args:
        batch: The replica's share, a `ReplicaBatch`; None for what is no part of a larger
            batch. tf.distribute traces each replica in its own thread.

    Yields:
        `batch`.
    """
    before = getattr(_current, "batch", None)
    _current.batch = batch
    try:
        yield batch
    finally:
        _current.batch = before


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Puts something else in a place of a class or module, while the context lasts.

    Args:
        owner: The class or module, in whose own `__dict__` the place is.
        name: Of the place.
        value: What to put there.
    """
    before = owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
