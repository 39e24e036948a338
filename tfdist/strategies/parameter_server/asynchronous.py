"""Asynchronous training: each worker takes the next batch, reads, computes, and updates.

A step is one function that the coordinator hands to a worker (`worker_steps.py`). Updates are
applied one after the other, each whole, to whatever the weights have become meanwhile (Dean et
al., "Large scale distributed deep networks", NIPS 2012, section 4.1, without its races).
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
_STEPS_TOGETHER = 8  # handed to a worker in one message, where nobody looks between them


class Asynchronous:
    """A model's functions for Keras's loop.

    Args:
        model: A compiled, built `keras.Model`, its variables on the servers.
        servers: What the chief is connected to.
        max_staleness: The bound that was asked for, or None.
        waiting_for: Limits a wait, as `Strategy.waiting_for` does.
        on_end: Is told how old weights were, when a training has ended.
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
        self._ledger = UpdateLog(servers.servers[0])
        self._pending: deque[Any] = deque()
        self._resident: list[tuple[Any, Any]] = []  # columns, and where workers have them
        self._drawing: tuple[Any, Any] = (None, None)  # an iterator, and what draws from it
        self._number = 0
        self._queued: list[Any] = []  # batches that wait for others to go with them
        self._next: tuple[Any, Any] = (None, None)  # what to do with them, and on what
        self._shown: Logs = {}
        self._shown_at = 0.0
        self._steps = WorkerSteps(model, self._ledger)
        self._train = self._steps.several(self._steps.train_step)
        self._test = self._steps.several(self._steps.test_step)
        self._predict = traced(model.predict_step)
        self._kind = KINDS[0]
        self._readers: dict[Any, Callable[[], Logs]] = {}
        self._traces: dict[Any, Any] = {}

    def functions(self) -> Functions:
        """Gives what Keras's loop calls."""
        return Functions(self._train_epoch, self._test_epoch, self._predict_batch, self.running)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Makes the model's metrics those of all steps that were begun, while it lasts."""
        self._own_results = self._model.get_metrics_result
        self._steps.known = {metric.name for metric in self._model.metrics}
        self._steps.known |= set(self._read_results())

        def settled() -> Logs:
            if not tf.executing_eagerly():  # a step that is traced asks for its own
                return self._own_results()  # type: ignore[no-any-return]
            self._settle()
            results = self._read_results()
            # Keras takes these for a step's own results where the names are the same.
            others = self._steps.returned[self._kind]
            return {name: self._shown[name] for name in others & self._shown.keys()} | results

        self._ledger.clear()
        self._number, self._shown, self._shown_at = 0, {}, 0.0
        vars(self._model)["get_metrics_result"] = settled
        try:
            yield
            self._settle()
            self._on_end(self._ledger.staleness())
        finally:
            del vars(self._model)["get_metrics_result"]
            self._queued.clear()
            self._pending.clear()
            self._resident.clear()

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
                    batches.append(self._drawn(epoch))  # noqa: PERF401, may raise
            except tf.errors.OutOfRangeError:
                if not batches:
                    raise
        self._queued += batches
        self._next = (function, epoch.columns)
        size = self._together(epoch, len(batches))
        if len(self._queued) >= size:
            with self._waiting_for(f"step {epoch.steps_taken}"):
                self._hand_out(size)
        epoch.note_progress(len(batches))
        if time.monotonic() > self._shown_at + _REFRESH_S:
            self._shown |= self._read_results()
            self._shown_at = time.monotonic()
        return dict(self._shown)

    def _together(self, epoch: Any, drawn: int) -> int:
        """Says how many steps to hand out at once: some, as long as all workers get some."""
        if self._model.steps_per_execution > 1:
            return drawn
        enough = self._num_workers * _STEPS_TOGETHER
        alone = epoch.is_watched or self._max_staleness is not None
        return 1 if alone or (epoch.steps_left or 0) < enough else _STEPS_TOGETHER

    def _hand_out(self, size: int) -> None:
        """Gives the batches that wait to workers; waits until few functions are under way."""
        function, columns = self._next
        while self._queued:
            batches = tuple(self._queued[:size])
            del self._queued[:size]
            first = tf.constant(self._number, tf.int64)
            self._number += len(batches)
            graph = self._traced_for(function, batches, first, columns)
            held = None if columns is None else self._on_workers(columns)
            self._pending.append(self._servers.schedule(graph, (batches, first, held)))
            most = window(self._max_staleness, self._num_workers, len(batches))
            while len(self._pending) >= most:
                self._shown |= self._pending.popleft().fetch()

    def _drawn(self, epoch: Any) -> Any:
        """Draws a batch, or the numbers of its rows."""
        if epoch.columns is not None:
            return tf.constant(next(epoch.iterator), tf.int64)
        # A function that fails, as at the end of data, cancels the steps that are under way.
        if epoch.may_end_early:
            return epoch.iterator.get_next().data
        iterator, draw = self._drawing  # a function takes a fraction of the time
        if iterator is not epoch.iterator:
            iterator = epoch.iterator
            draw = traced(lambda: iterator.get_next().data).get_concrete_function()
            self._drawing = (iterator, draw)
        return draw()

    def _traced_for(self, function: Any, batches: Any, first: Tensor, columns: Any) -> Any:
        """Finds a function's trace for such batches; TensorFlow looks for it much longer."""
        leaves = tf.nest.flatten((batches, columns), expand_composites=True)
        key = (function, *((leaf.shape, leaf.dtype) for leaf in leaves if leaf is not None))
        if key not in self._traces:
            held = None
            if columns is not None:  # of which each worker has an iterator
                held = tf.data.IteratorSpec(
                    tf.nest.map_structure(tf.type_spec_from_value, columns)
                )
            self._traces[key] = function.get_concrete_function(batches, first, held)
        return self._traces[key]

    def _on_workers(self, columns: Any) -> Any:
        """Sends arrays to the workers, once; gives what a step reads them from."""
        for known, iterator in self._resident:
            if known is columns:
                return iterator
        dataset = self._servers.coordinator.create_per_worker_dataset(
            lambda: tf.data.Dataset.from_tensors(columns).repeat()
        )
        self._resident.append((columns, iter(dataset)))
        return self._resident[-1][1]

    def _predict_batch(self, shares: list[Any]) -> Any:
        """Predicts global batches, each worker a slice of each."""
        with self._waiting_for("a step"):
            pending = [
                self._servers.coordinator.schedule(self._predict, args=(piece,))
                for share in shares
                for piece in _pieces(share.data, self._num_workers)
            ]
            outputs = [one.fetch() for one in pending]
        # Keras asks what it gets for NumPy arrays.
        return tf.nest.map_structure(
            lambda *parts: tf.constant(np.concatenate(parts)), *outputs
        )

    def _read_results(self) -> Logs:
        """Reads the metrics' results, under the names that steps return them by."""
        key = (self._kind, bool(self._steps.named[self._kind]))
        if key not in self._readers:
            self._readers[key] = traced(self._results)
        return self._readers[key]()

    def _results(self) -> Logs:
        with tf.device(self._ledger.server):  # in one call
            named = self._steps.named[self._kind]
            if not named:
                results: Logs = self._own_results()
                return results
            return {
                name: tf.nest.flatten(metric.result())[number]
                for name, (metric, number) in named.items()
            }

    def _settle(self) -> None:
        """Waits until all steps that were begun are done."""
        if self._queued or self._pending:
            with self._waiting_for("the last steps of an epoch"):
                self._hand_out(1)
                self._servers.coordinator.join()
                for one in self._pending:
                    self._shown |= one.fetch()
            self._pending.clear()


def window(max_staleness: int | None, workers: int, updates: int) -> int:
    """Says how many functions may be under way so that no update is staler than allowed.

    An update may be overtaken by those that were under way on other workers when it began,
    and by those that began while it was the oldest: a function begins only if fewer than the
    window are under way from the oldest on.

    Args:
        max_staleness: The bound, or None for a window that keeps all workers busy.
        workers: How many there are.
        updates: Of one function, one after the other.

    Returns:
        At least 1.

    Example:
        >>> window(None, 2, 1), window(0, 2, 1), window(2, 2, 1), window(9, 4, 2)
        (4, 1, 2, 3)
    """
    if max_staleness is None:
        return 2 * workers  # one under way on each, and one that is sent to it meanwhile
    most = 1
    while updates * (min(workers - 1, most) + most) <= max_staleness:
        most += 1
    return most


def _pieces(data: Any, count: int) -> list[Any]:
    """Cuts a batch into as many pieces as there are workers, or rows."""
    rows = int(tf.shape(tf.nest.flatten(data)[0])[0])
    count = max(1, min(count, rows))
    edges = [rows * i // count for i in range(count + 1)]
    return [
        tf.nest.map_structure(lambda leaf: leaf[begin:end], data)  # noqa: B023, used at once
        for begin, end in itertools.pairwise(edges)
    ]
