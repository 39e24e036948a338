"""One replica's train, test and predict step."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import tensorflow as tf

from tfdist import _keras
from tfdist._keras import ReplicaBatch
from tfdist.data import Share, no_groups
from tfdist.step.agreement import StepAgreement
from tfdist.step.exchange import Exchange
from tfdist.step.own_step import OwnStep
from tfdist.step.reduction import MetricState, ReducedUpdates
from tfdist.step.signals import Signals, Tensor, no_signals, signals_of
from tfdist.strategies.base import Strategy

Logs = dict[str, Tensor]
Result = tuple[Logs, Signals]


class ReplicaSteps:
    """One replica's train, test and predict step.

    Args:
        model: A compiled, built `keras.Model`.
        strategy: The strategy on whose replicas it runs.
        own_step: An extension's step, or None.
        exchange: An extension's exchange, or None.
    """

    def __init__(
        self,
        model: Any,
        strategy: Strategy,
        own_step: OwnStep | None,
        exchange: Exchange | None,
    ) -> None:
        self.model = model
        self.strategy = strategy
        self.own_step = own_step
        self.exchange = exchange
        self.alone = strategy.place.num_replicas == 1
        self.is_extended = own_step is not None or exchange is not None
        self.train_step, self.test_step = model.train_step, model.test_step
        if not self.alone or self.is_extended:
            self.train_step = _keras.step_of(model, "train_step")
        if not self.alone:
            self.test_step = _keras.step_of(model, "test_step")
        self.elements = sum(math.prod(v.shape) for v in model.trainable_variables)

    def train(self, share: Share, stopping: Tensor, phase: Hashable) -> Result:
        """Makes one train step, with one update of the weights."""
        if share.total is None and self.is_extended:
            # A single replica gets the batches of a stream as they are. An extension needs
            # their description too.
            count = tf.shape(tf.nest.flatten(share.data)[0], tf.int64)[0]
            nothing = tf.constant(0, tf.int64)
            share = Share(share.data, count, count, nothing, tf.zeros([4]), no_groups())
        if share.total is None:
            return self.train_step(share.data), no_signals()
        with _keras.on_replica(self._batch(share)) as batch:
            own_step = self.own_step
            # It may ask all workers to stop, so it comes before the agreement sends `stopping`.
            if own_step is not None:
                data, stopping = own_step.begin_step(share.data, batch, stopping)
                share = share._replace(data=data)
            exchange = None if self.exchange is None else (self.exchange, phase)
            agreement = StepAgreement(self.strategy, share, stopping, self.elements, exchange)
            updates = ReducedUpdates(
                self.model, batch, agreement, self.strategy, are_parts=own_step is not None
            )
            batch.metrics = metrics = MetricState(not _keras.has_own(self.model, "train_step"))
            batch.updates = updates
            if own_step is None:
                logs = self.train_step(share.data)
            else:
                logs = own_step.train_step(share.data, batch, share.groups)
            # From here on, variables are assigned as usual. `finish` makes the step's last
            # reduction, which every replica must reach, whatever its rows were.
            batch.updates = batch.metrics = None
            updates.finish(metrics)
            return self._logs(batch, logs), signals_of(agreement, share)

    def test(self, share: Share, stopping: Tensor, phase: Hashable) -> Result:
        """Makes one test step, which adds a share to the metrics."""
        if self.alone:
            return self.test_step(share.data), no_signals()
        with _keras.on_replica(self._batch(share)) as batch:
            agreement = StepAgreement(self.strategy, share, stopping)
            batch.metrics = metrics = MetricState(not _keras.has_own(self.model, "test_step"))
            logs = self.test_step(share.data)
            batch.metrics = None
            _, changes = agreement.reduce(batch, [], metrics.changes(batch))
            metrics.assign(changes)
            return self._logs(batch, logs), signals_of(agreement, share)

    def predict(self, share: Share) -> Any:
        """Returns the outputs for the whole global batch, in its order."""
        if self.alone:
            return self.model.predict_step(share.data)
        with _keras.on_replica(self._batch(share)):
            outputs = self.model.predict_step(share.data)
            # A share without examples holds one row of padding.
            return tf.nest.map_structure(
                lambda output: self.strategy.all_gather(output[: share.rows]), outputs
            )

    def _batch(self, share: Share) -> ReplicaBatch:
        return ReplicaBatch(
            share.rows,
            share.total,
            share.offset,
            self.strategy.all_reduce_sum,
            self.strategy.all_gather,
        )

    def _logs(self, batch: ReplicaBatch, logs: Logs) -> Logs:
        """Returns the results of reduced metrics, and the means of the other logs."""
        leaves = tf.nest.flatten(logs)
        entries = [batch.metric_of(leaf) for leaf in leaves]
        metrics = {id(entry[0]): entry[0] for entry in entries if entry is not None}
        results = {key: tf.nest.flatten(metric.result()) for key, metric in metrics.items()}
        others = [
            tf.cast(leaf, tf.float32) * batch.share
            for leaf, entry in zip(leaves, entries, strict=True)
            if entry is None
        ]
        means = iter(batch.all_reduce(others) if others else ())
        reduced = [
            next(means) if entry is None else results[id(entry[0])][entry[1]]
            for entry in entries
        ]
        packed: Logs = tf.nest.pack_sequence_as(logs, reduced)
        return packed
