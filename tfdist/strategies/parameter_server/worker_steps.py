"""The steps of asynchronous training, as a worker makes them.

What a step computes is computed without touching a variable: Keras's own `train_step` runs in
a `keras.StatelessScope`. Then the gradients travel to the servers, and all that the step
changes is changed in one section, under a lock on the first server.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from tfdist import _keras
from tfdist._keras import ReplicaBatch, served
from tfdist.strategies.parameter_server.update_log import UpdateLog
from tfdist.strategies.parameter_server.updates import (
    LARGEST_PACKED,
    ServerUpdates,
    sent_together,
)

Tensor = Any
Logs = dict[str, Any]
KINDS = ("train_step", "test_step")


class WorkerSteps:
    """A model's steps on any worker.

    Args:
        model: A compiled, built `keras.Model`, its variables on the servers.
        ledger: What the first server knows of updates.

    Attributes:
        known: Names of the model's metrics: what a step returns under them is not sent.
        named: Of a step of the model's own: the metrics whose results it returns, by name.
        returned: What else such a step returns.
    """

    def __init__(self, model: Any, ledger: UpdateLog) -> None:
        self._model = model
        self._ledger = ledger
        self._train_of_model = _keras.step_of(model, "train_step")
        self._test_of_model = _keras.step_of(model, "test_step")
        self._is_own = {kind: _keras.has_own(model, kind) for kind in KINDS}
        self.known: set[str] = set()
        self.named: dict[str, dict[str, tuple[Any, int]]] = {kind: {} for kind in KINDS}
        self.returned: dict[str, set[str]] = {kind: set() for kind in KINDS}

    def several(self, step: Callable[[Any, Tensor], Logs]) -> Any:
        """Makes a function of several batches, a step each, the first with a given number.

        Args:
            step: Of a batch and its number.
        """
        one = traced(step)

        def several(batches: tuple[Any, ...], first: Tensor, columns: Any) -> Logs:
            resident = None if columns is None else next(columns)
            # Not in a loop, which on several processes goes over all of them in each round.
            for index, batch in enumerate(batches):
                extra: Logs = one(_rows(batch, resident), first + index)
            return extra

        return traced(several)

    def train_step(self, data: Any, number: Tensor) -> Logs:
        """Makes a step of training.

        Args:
            data: A batch.
            number: Scalar int64, the step's.
        """
        model, ledger = self._model, self._ledger
        with tf.device(ledger.server):
            read = tf.identity(ledger.version)
        weights = self._weights(after=[read])
        statistics = [v for v in model.non_trainable_variables if v.dtype.startswith("float")]
        later = [] if len(weights) == len(model.trainable_variables) else [read]
        with (
            tf.control_dependencies(later),
            self._apart(data, number, weights) as (scope, batch),
        ):
            before = {id(v): tf.convert_to_tensor(v) for v in statistics}
            batch.updates = updates = ServerUpdates(model, ledger, number)
            logs = self._train_of_model(data)
            batch.updates = None
            averages = served.averaging_variables(model)
            changed = [v for v in statistics if scope.assigned(v) is not None]
            # A mean that overtakes itself could leave what it is a mean of.
            values = [
                scope.assigned(v) if id(v) in averages else scope.assigned(v) - before[id(v)]
                for v in changed
            ]
            *values, read = self._at_server([*values, read])
            counts, there = self._counted(scope, number)

            def change() -> None:
                self._add_metrics(counts)
                for variable, value in zip(changed, values, strict=True):
                    if id(variable) in averages:
                        _keras.backing_variable(variable).assign(value)
                    else:
                        _keras.backing_variable(variable).assign_add(value)
                ledger.note(read)

            updates.finish(change, there, [*counts, *values, read])
        return self._extra(logs, batch, KINDS[0])

    def test_step(self, data: Any, number: Tensor) -> Logs:
        """Adds a batch to the metrics.

        Args:
            data: A batch.
            number: Scalar int64, the step's.
        """
        with self._apart(data, number, self._weights()) as (scope, batch):
            logs = self._test_of_model(data)
            counts, there = self._counted(scope, number)
            with served.stateful(), tf.control_dependencies(counts):
                self._ledger.once(there, 0, lambda: self._add_metrics(counts))
        return self._extra(logs, batch, KINDS[1])

    def _weights(self, after: Sequence[Tensor] = ()) -> list[tuple[Any, Tensor]]:
        """Reads what a step reads as a whole."""
        # An own train step may look at what its first update has made of the weights.
        if _keras.has_own(self._model, "train_step"):
            return []
        return served.read_together(self._model, LARGEST_PACKED, after)

    @contextlib.contextmanager
    def _apart(
        self, data: Any, number: Tensor, weights: list[tuple[Any, Tensor]]
    ) -> Iterator[tuple[Any, ReplicaBatch]]:
        """Computes on a batch without changing a variable; metrics begin at zero."""
        metrics = _keras.metric_variables(self._model)
        zeros = [(v, tf.zeros(v.shape, v.dtype)) for v in metrics]
        rows = tf.shape(tf.nest.flatten(data)[0], tf.int64)[0]
        # What a step drops is a function of its number, as seeds are read and not written.
        batch = ReplicaBatch(rows, rows, number * rows, list, tf.identity)
        with served.Apart(zeros, weights) as scope, _keras.on_replica(batch):
            yield scope, batch

    def _at_server(self, tensors: list[Tensor]) -> list[Tensor]:
        return sent_together(tensors, self._ledger.server)

    def _counted(self, scope: Any, number: Tensor) -> tuple[list[Tensor], Tensor]:
        """Sends what a batch added to the metrics, and its number, in one tensor."""
        found = [scope.assigned(v) for v in _keras.metric_variables(self._model)]
        exact = [tf.cast(value, tf.float64) for value in (*found, number)]
        *counts, there = self._at_server(exact)
        with tf.device(self._ledger.server):
            return counts, tf.cast(there, tf.int64)

    def _add_metrics(self, counts: list[Tensor]) -> None:
        metrics = _keras.metric_variables(self._model)
        for variable, count in zip(metrics, counts, strict=True):
            _keras.backing_variable(variable).assign_add(tf.cast(count, variable.dtype))

    def _extra(self, logs: Logs, batch: ReplicaBatch, kind: str) -> Logs:
        """Keeps what a step returned besides metrics; notes which metrics it returned."""
        if not self._is_own[kind]:
            return {n: tf.convert_to_tensor(v) for n, v in logs.items() if n not in self.known}
        found = {name: batch.metric_of(value) for name, value in logs.items()}
        named = {name: metric for name, metric in found.items() if metric is not None}
        others = set(logs) - set(named)
        self.named[kind], self.returned[kind] = named, others
        return {name: tf.convert_to_tensor(logs[name]) for name in sorted(others)}


def _rows(batch: Any, columns: Any) -> Any:
    """Gathers a batch from the columns that a worker has, where there are some."""
    if columns is None:
        return batch
    return tf.nest.map_structure(lambda column: tf.gather(column, batch), columns)


def traced(function: Callable[..., Any]) -> Any:
    """Makes a graph of a function for any sizes of batches.

    Args:
        function: Of tensors.
    """
    return tf.function(
        tf.autograph.experimental.do_not_convert(function), reduce_retracing=True
    )
