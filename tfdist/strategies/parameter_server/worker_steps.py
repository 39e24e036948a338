"""The steps of asynchronous training, as a worker runs them.

A step computes without assigning a variable: Keras's own `train_step` runs in a
`keras.StatelessScope`. Then the gradients move to the servers. All changes of the step are
applied in one section, under a lock on the first server.
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
    move_packed,
)

Tensor = Any
Logs = dict[str, Any]
KINDS = ("train_step", "test_step")


class WorkerSteps:
    """A model's steps on any worker.

    Args:
        model: A compiled, built `keras.Model`, with its variables on the servers.
        update_log: The log of updates on the first server.

    Attributes:
        metric_names: Names of the model's metrics. A step sends no results by these names.
        named: For each kind of custom step: the metrics whose results it returns, by name.
        returned: For each kind of custom step: the names of all other values it returns.
    """

    def __init__(self, model: Any, update_log: UpdateLog) -> None:
        self._model = model
        self._update_log = update_log
        self._train_of_model = _keras.step_of(model, "train_step")
        self._test_of_model = _keras.step_of(model, "test_step")
        self._is_custom = {kind: _keras.has_own(model, kind) for kind in KINDS}
        self.metric_names: set[str] = set()
        self.named: dict[str, dict[str, tuple[Any, int]]] = {kind: {} for kind in KINDS}
        self.returned: dict[str, set[str]] = {kind: set() for kind in KINDS}

    def several(self, step: Callable[[Any, Tensor], Logs]) -> Any:
        """Makes a function that runs a step on each of several batches.

        Args:
            step: A function of a batch and a step number.

        Returns:
            A function of a tuple of batches, the number of the first step, and an iterator
            over the columns from which to gather batches, or None.
        """
        traced_step = traced(step)

        def several(batches: tuple[Any, ...], first: Tensor, columns: Any) -> Logs:
            local_columns = None if columns is None else next(columns)
            # Unrolled: a TensorFlow loop synchronizes all its processes in each iteration.
            for index, batch in enumerate(batches):
                logs: Logs = traced_step(_gather_rows(batch, local_columns), first + index)
            return logs

        return traced(several)

    def train_step(self, data: Any, number: Tensor) -> Logs:
        """Runs a training step.

        Args:
            data: A batch.
            number: Scalar int64, the step number.
        """
        model, update_log = self._model, self._update_log
        with tf.device(update_log.server):
            version = tf.identity(update_log.version)
        weights = self._read_weights(after=[version])
        statistics = [v for v in model.non_trainable_variables if v.dtype.startswith("float")]
        # Weights that the step reads itself must be read after the version too.
        read_before = [] if len(weights) == len(model.trainable_variables) else [version]
        with (
            tf.control_dependencies(read_before),
            self._stateless(data, number, weights) as (scope, batch),
        ):
            before = {id(v): tf.convert_to_tensor(v) for v in statistics}
            batch.updates = updates = ServerUpdates(model, update_log, number)
            logs = self._train_of_model(data)
            batch.updates = None
            averages = served.averaging_variables(model)
            changed_statistics = [v for v in statistics if scope.assigned(v) is not None]
            # A moving average is assigned. Adding the differences of several steps that read
            # the same average could push it beyond the values that it averages.
            values = [
                scope.assigned(v) if id(v) in averages else scope.assigned(v) - before[id(v)]
                for v in changed_statistics
            ]
            *values, version = self._move_to_server([*values, version])
            metric_sums, number_on_server = self._move_metrics(scope, number)

            def change() -> None:
                self._add_metrics(metric_sums)
                for variable, value in zip(changed_statistics, values, strict=True):
                    if id(variable) in averages:
                        _keras.backing_variable(variable).assign(value)
                    else:
                        _keras.backing_variable(variable).assign_add(value)
                update_log.count(version)

            updates.finish(change, number_on_server, [*metric_sums, *values, version])
        return self._other_logs(logs, batch, KINDS[0])

    def test_step(self, data: Any, number: Tensor) -> Logs:
        """Adds a batch to the metrics.

        Args:
            data: A batch.
            number: Scalar int64, the step number.
        """
        with self._stateless(data, number, self._read_weights()) as (scope, batch):
            logs = self._test_of_model(data)
            metric_sums, number_on_server = self._move_metrics(scope, number)
            with served.stateful(), tf.control_dependencies(metric_sums):
                self._update_log.once(
                    number_on_server, 0, lambda: self._add_metrics(metric_sums)
                )
        return self._other_logs(logs, batch, KINDS[1])

    def _read_weights(self, after: Sequence[Tensor] = ()) -> list[tuple[Any, Tensor]]:
        """Reads the weights that a step needs as a whole."""
        # A custom train step may read weights again after its first update.
        if _keras.has_own(self._model, "train_step"):
            return []
        return served.read_packed(self._model, LARGEST_PACKED, after)

    @contextlib.contextmanager
    def _stateless(
        self, data: Any, number: Tensor, weights: list[tuple[Any, Tensor]]
    ) -> Iterator[tuple[Any, ReplicaBatch]]:
        """Makes a context for a batch in which no variable changes. Metrics begin at zero."""
        metrics = _keras.metric_variables(self._model)
        zeros = [(v, tf.zeros(v.shape, v.dtype)) for v in metrics]
        rows = tf.shape(tf.nest.flatten(data)[0], tf.int64)[0]
        # The step number takes the place of the row offset, from which dropout masks follow:
        # no worker advances the seed generators, since no variable is assigned.
        batch = ReplicaBatch(rows, rows, number * rows, list, tf.identity)
        with served.StepScope(zeros, weights) as scope, _keras.on_replica(batch):
            yield scope, batch

    def _move_to_server(self, tensors: list[Tensor]) -> list[Tensor]:
        return move_packed(tensors, self._update_log.server)

    def _move_metrics(self, scope: Any, number: Tensor) -> tuple[list[Tensor], Tensor]:
        """Moves a batch's metric state and its step number to the server, in one tensor."""
        metric_sums = [scope.assigned(v) for v in _keras.metric_variables(self._model)]
        exact = [tf.cast(value, tf.float64) for value in (*metric_sums, number)]
        *metric_sums, number_on_server = self._move_to_server(exact)
        with tf.device(self._update_log.server):
            return metric_sums, tf.cast(number_on_server, tf.int64)

    def _add_metrics(self, metric_sums: list[Tensor]) -> None:
        variables = _keras.metric_variables(self._model)
        for variable, value in zip(variables, metric_sums, strict=True):
            _keras.backing_variable(variable).assign_add(tf.cast(value, variable.dtype))

    def _other_logs(self, logs: Logs, batch: ReplicaBatch, kind: str) -> Logs:
        """Returns the logs that are no metrics' results, and notes which metrics there are."""
        if not self._is_custom[kind]:
            return {
                name: tf.convert_to_tensor(value)
                for name, value in logs.items()
                if name not in self.metric_names
            }
        metrics = {name: batch.metric_of(value) for name, value in logs.items()}
        named = {name: metric for name, metric in metrics.items() if metric is not None}
        other_names = set(logs) - set(named)
        self.named[kind], self.returned[kind] = named, other_names
        return {name: tf.convert_to_tensor(logs[name]) for name in sorted(other_names)}


def _gather_rows(batch: Any, columns: Any) -> Any:
    """Gathers a batch from a worker's columns, or returns the batch if there are none."""
    if columns is None:
        return batch
    return tf.nest.map_structure(lambda column: tf.gather(column, batch), columns)


def traced(function: Callable[..., Any]) -> Any:
    """Makes a `tf.function` for batches of any size.

    Args:
        function: A function of tensors.
    """
    return tf.function(
        tf.autograph.experimental.do_not_convert(function), reduce_retracing=True
    )
