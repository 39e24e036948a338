"""Asynchronous training: each worker takes the next batch, reads weights and updates them.

A step is one function that the coordinator schedules on a worker (`worker_steps.py`). Updates
are applied one after the other, each as a whole, to the weights as earlier updates have left
them (Dean et al., "Large scale distributed deep networks", NIPS 2012, section 4.1, without
its races).
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from tfdist.errors import ArgumentError
from tfdist.strategies.base import Functions
from tfdist.strategies.parameter_server.servers import Servers
from tfdist.strategies.parameter_server.update_log import Staleness, UpdateLog
from tfdist.strategies.parameter_server.worker_steps import KINDS, WorkerSteps, traced

Tensor = Any
Logs = dict[str, Any]

_REFRESH_S = 0.25
_STEPS_PER_MESSAGE = 8  # steps of one message to a worker, if no callback needs each step


class Asynchronous:
    """A model's functions for Keras's loop.

    Args:
        model: A compiled, built `keras.Model`, with its variables on the servers.
        servers: The servers and workers that the chief is connected to.
        max_staleness: The bound of the staleness, or None.
        waiting_for: Limits a wait, as `Strategy.waiting_for` does.
        on_end: Called with the staleness at the end of a training.
    """

    def __init__(
        self,
        model: Any,
        servers: Servers,
        max_staleness: int | None,
        waiting_for: Callable[[str], contextlib.AbstractContextManager[None]],
        on_end: Callable[[Staleness], None],
    ) -> None:
        self._model = model
        self._servers = servers
        self._num_workers = len(servers.workers)
        self._max_staleness = max_staleness
        self._waiting_for = waiting_for
        self._on_end = on_end
        self._update_log = UpdateLog(servers.servers[0])
        self._pending: deque[Any] = deque()  # results of scheduled functions
        # Columns of arrays, and the iterator by which workers read their copy.
        self._columns_on_workers: list[tuple[Any, Any]] = []
        # An iterator over batches, and its traced `get_next`.
        self._traced_iterator: tuple[Any, Any] = (None, None)
        self._number = 0  # the next step's
        self._queued: list[Any] = []  # batches for the next message
        self._queued_for: tuple[Any, Any] = (None, None)  # their function and columns
        self._logs: Logs = {}  # the last known
        self._logs_read_at = 0.0
        self._steps = WorkerSteps(model, self._update_log)
        self._train = self._steps.several(self._steps.train_step)
        self._test = self._steps.several(self._steps.test_step)
        self._predict = traced(model.predict_step)
        self._kind = KINDS[0]
        self._readers: dict[Any, Callable[[], Logs]] = {}
        self._traces: dict[Any, Any] = {}

    def functions(self) -> Functions:
        """Returns the functions for Keras's loop."""
        return Functions(self._train_epoch, self._test_epoch, self._predict_batch, self.running)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Makes the model's metric results wait for all scheduled steps, in this context."""
        self._model_results = self._model.get_metrics_result
        self._steps.metric_names = {metric.name for metric in self._model.metrics}
        self._steps.metric_names |= set(self._read_results())

        def results_of_all_steps() -> Logs:
            if not tf.executing_eagerly():  # called while a step is traced
                return self._model_results()  # type: ignore[no-any-return]
            self._finish_pending()
            results = self._read_results()
            # Keras compares the names with those that a step returned. If a name is missing,
            # it keeps the step's logs instead of these results.
            other_names = self._steps.returned[self._kind]
            return {
                name: self._logs[name] for name in other_names & self._logs.keys()
            } | results

        self._update_log.clear()
        self._number, self._logs, self._logs_read_at = 0, {}, 0.0
        vars(self._model)["get_metrics_result"] = results_of_all_steps
        try:
            yield
            self._finish_pending()
            self._on_end(self._update_log.staleness())
        finally:
            del vars(self._model)["get_metrics_result"]
            self._queued.clear()
            self._pending.clear()
            self._columns_on_workers.clear()

    # --- on the chief -----------------------------------------------------------------

    def _train_epoch(self, epoch: Any) -> Logs:
        self._kind = KINDS[0]
        return self._schedule(epoch, self._train)

    def _test_epoch(self, epoch: Any) -> Logs:
        self._kind = KINDS[1]
        return self._schedule(epoch, self._test)

    def _schedule(self, epoch: Any, function: Callable[..., Any]) -> Logs:
        if epoch.may_be_empty:
            raise ArgumentError(
                "The sampler must give every step a row in asynchronous training. Received: "
                "one that may give none, such as Poisson. Use another strategy, or "
                "ParameterServer(synchronous=True)."
            )
        steps = epoch.pass_made(epoch.take(self._model.steps_per_execution))
        if steps == 0:
            return dict(epoch.logs)
        batches = []
        with epoch.drawing():
            try:
                for _ in range(steps):
                    batches.append(self._next_batch(epoch))  # noqa: PERF401, may raise
            except tf.errors.OutOfRangeError:
                if not batches:
                    raise
        self._queued += batches
        self._queued_for = (function, epoch.columns)
        size = self._message_size(epoch, len(batches))
        if len(self._queued) >= size:
            with self._waiting_for(f"step {epoch.steps_taken}"):
                self._schedule_queued(size)
        epoch.note_progress(len(batches))
        if time.monotonic() > self._logs_read_at + _REFRESH_S:
            self._logs |= self._read_results()
            self._logs_read_at = time.monotonic()
        return dict(self._logs)

    def _message_size(self, epoch: Any, num_batches: int) -> int:
        """Returns how many steps go into one message, so that each worker still gets some."""
        if self._model.steps_per_execution > 1:
            return num_batches
        enough = self._num_workers * _STEPS_PER_MESSAGE
        is_single = epoch.is_watched or self._max_staleness is not None
        return 1 if is_single or (epoch.steps_left or 0) < enough else _STEPS_PER_MESSAGE

    def _schedule_queued(self, size: int) -> None:
        """Schedules the queued batches, and waits until fewer than `window` are pending."""
        function, columns = self._queued_for
        while self._queued:
            batches = tuple(self._queued[:size])
            del self._queued[:size]
            first = tf.constant(self._number, tf.int64)
            self._number += len(batches)
            graph = self._traced_for(function, batches, first, columns)
            iterator = None if columns is None else self._iterator_on_workers(columns)
            self._pending.append(self._servers.schedule(graph, (batches, first, iterator)))
            limit = window(self._max_staleness, self._num_workers, len(batches))
            while len(self._pending) >= limit:
                self._logs |= self._pending.popleft().fetch()

    def _next_batch(self, epoch: Any) -> Any:
        """Reads the next batch, or the row numbers of one whose columns workers have."""
        if epoch.columns is not None:
            return tf.constant(next(epoch.iterator), tf.int64)
        # A traced function that fails, here at the end of the data, cancels the pending
        # steps. So the iterator is traced only if the number of batches is known.
        if epoch.may_end_early:
            return epoch.iterator.get_next().data
        iterator, next_batch = self._traced_iterator
        if iterator is not epoch.iterator:
            iterator = epoch.iterator
            next_batch = traced(lambda: iterator.get_next().data).get_concrete_function()
            self._traced_iterator = (iterator, next_batch)
        return next_batch()

    def _traced_for(self, function: Any, batches: Any, first: Tensor, columns: Any) -> Any:
        """Returns a function's trace for such batches, faster than TensorFlow's own cache."""
        leaves = tf.nest.flatten((batches, columns), expand_composites=True)
        key = (function, *((leaf.shape, leaf.dtype) for leaf in leaves if leaf is not None))
        if key not in self._traces:
            iterator = None
            if columns is not None:
                iterator = tf.data.IteratorSpec(
                    tf.nest.map_structure(tf.type_spec_from_value, columns)
                )
            self._traces[key] = function.get_concrete_function(batches, first, iterator)
        return self._traces[key]

    def _iterator_on_workers(self, columns: Any) -> Any:
        """Sends columns to the workers once. Returns the iterator from which a step reads."""
        for sent_columns, iterator in self._columns_on_workers:
            if sent_columns is columns:
                return iterator
        dataset = self._servers.coordinator.create_per_worker_dataset(
            lambda: tf.data.Dataset.from_tensors(columns).repeat()
        )
        self._columns_on_workers.append((columns, iter(dataset)))
        return self._columns_on_workers[-1][1]

    def _predict_batch(self, shares: list[Any]) -> Any:
        """Predicts global batches. Each worker gets a slice of each."""
        with self._waiting_for("a step"):
            pending = [
                self._servers.coordinator.schedule(self._predict, args=(piece,))
                for share in shares
                for piece in _pieces(share.data, self._num_workers)
            ]
            outputs = [result.fetch() for result in pending]
        # Keras calls `.numpy()` on the outputs.
        return tf.nest.map_structure(
            lambda *parts: tf.constant(np.concatenate(parts)), *outputs
        )

    def _read_results(self) -> Logs:
        """Reads the metrics' results, under the names by which steps return them."""
        key = (self._kind, bool(self._steps.named[self._kind]))
        if key not in self._readers:
            self._readers[key] = traced(self._results)
        return self._readers[key]()

    def _results(self) -> Logs:
        with tf.device(self._update_log.server):  # where the metrics are: one remote call
            named = self._steps.named[self._kind]
            if not named:
                results: Logs = self._model_results()
                return results
            return {
                name: tf.nest.flatten(metric.result())[number]
                for name, (metric, number) in named.items()
            }

    def _finish_pending(self) -> None:
        """Waits for the end of all steps that are queued or scheduled."""
        if self._queued or self._pending:
            with self._waiting_for("the last steps of an epoch"):
                self._schedule_queued(1)
                self._servers.coordinator.join()
                for result in self._pending:
                    self._logs |= result.fetch()
            self._pending.clear()


def window(max_staleness: int | None, workers: int, updates: int) -> int:
    """Computes how many functions may be pending so that no update exceeds the staleness.

    Two kinds of updates can come before an update: those of functions that ran on other
    workers when it began, and those of functions that began while it was the oldest. A
    function begins only if fewer functions than the window are pending.

    Args:
        max_staleness: The bound, or None for a window that keeps all workers busy.
        workers: Number of workers.
        updates: Number of updates of one function.

    Returns:
        The window, at least 1.

    Example:
        >>> window(None, 2, 1), window(0, 2, 1), window(2, 2, 1), window(9, 4, 2)
        (4, 1, 2, 3)
    """
    if max_staleness is None:
        return 2 * workers  # each worker runs one function while the next is sent to it
    size = 1
    while updates * (min(workers - 1, size) + size) <= max_staleness:
        size += 1
    return size


def _pieces(data: Any, count: int) -> list[Any]:
    """Cuts a batch into pieces: as many as workers, and no more than rows."""
    rows = int(tf.shape(tf.nest.flatten(data)[0])[0])
    count = max(1, min(count, rows))
    edges = [rows * i // count for i in range(count + 1)]
    return [
        tf.nest.map_structure(lambda leaf: leaf[begin:end], data)  # noqa: B023, used at once
        for begin, end in itertools.pairwise(edges)
    ]
