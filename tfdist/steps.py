"""The train, test and predict steps that every strategy runs.

A step is Keras's own `train_step`, run on each replica's share of the global batch, with
one exact reduction: each replica's loss is scaled by its part of the batch, so gradients
are summed and need no division; metrics are summed as state; both travel together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import tensorflow as tf

from tfdist import _keras
from tfdist._keras import ReplicaBatch
from tfdist.data import Epoch, Share
from tfdist.errors import DisagreementError
from tfdist.strategies.base import Strategy

Tensor = Any
Logs = dict[str, Tensor]


STOPPED, DISAGREED = 1, 2


@dataclass
class Stop:
    """Whether a callback of this or of another worker asked to stop.

    Attributes:
        requested: Set by this worker's callbacks; goes out with the next step.
        agreed: Set when a step learned of a request: that step changed nothing, on any
            worker, so all of them stop after the one before.
    """

    requested: bool = False
    agreed: bool = False


class Signals(NamedTuple):
    """What the workers tell each other at every step, in the gradients' collective.

    Attributes:
        status: Scalar int32: 0, or `STOPPED` or `DISAGREED`, in which case nothing changed.
        check: This worker's `Share.check`.
    """

    status: Tensor
    check: Tensor


@dataclass(frozen=True)
class Functions:
    """What Keras's loop calls instead of what it would build for itself."""

    train: Callable[[Epoch], Logs]
    test: Callable[[Epoch], Logs]
    predict: Callable[[list[Share]], Any]


def make_functions(model: Any, strategy: Strategy, stop: Stop) -> Functions:
    """Builds the functions of a model on a strategy; they are traced when first called.

    Args:
        model: A compiled, built `keras.Model`, its variables held by the strategy.
        strategy: Where its replicas are.
        stop: Shared with the callback that sets `requested` and reads `agreed`.

    Returns:
        The functions for `_keras.loop_functions`.
    """
    replica = _Replica(model, strategy)
    return Functions(
        train=_over_epoch(model, strategy, replica.train, stop),
        test=_over_epoch(model, strategy, replica.test, Stop()),
        predict=_over_shares(model, strategy, replica.predict),
    )


def _traced(model: Any, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    function = tf.autograph.experimental.do_not_convert(function)
    if model.run_eagerly:
        return function
    traced: Callable[..., Any] = tf.function(function, reduce_retracing=True, **options)
    return traced


def _over_epoch(
    model: Any, strategy: Strategy, step: Callable[..., Any], stop: Stop
) -> Callable[[Epoch], Logs]:
    """Wraps a replica's step into a function of an epoch, `steps_per_execution` at a time."""
    Result = tuple[Logs, Signals]

    def after_data(share: Share, stopping: Tensor) -> Result:
        # When the data is over, drawing fails, and then nothing must have been changed.
        with tf.control_dependencies([share.rows]):
            result: Result = step(share, stopping)
            return result

    def one_step(share: Share, stopping: Tensor) -> Result:
        result: Result = strategy.run(after_data, share, stopping)
        return result

    alone = strategy.place.num_replicas == 1
    compiled_step = _traced(model, one_step, jit_compile=alone and model.jit_compile)

    def one(iterator: Any, stopping: Tensor) -> Result:
        result: Result = compiled_step(iterator.get_next(), stopping)
        return result

    def several(iterator: Any, steps: Tensor, stopping: Tensor) -> Result:
        def again(done: Tensor, _: Any) -> tuple[Tensor, Result]:
            return done + 1, one(iterator, stopping)

        started = (tf.constant(1), one(iterator, stopping))
        _, last = tf.while_loop(lambda done, _: done < steps, again, started)
        return last  # type: ignore[no-any-return]

    traced_one, traced_several = _traced(model, one), _traced(model, several)

    def function(epoch: Epoch) -> Logs:
        steps = epoch.take(model.steps_per_execution)
        stopping = tf.constant(float(stop.requested))
        with epoch.drawing(), strategy.waiting_for("a step"):
            if model.steps_per_execution == 1:
                logs, signals = traced_one(epoch.iterator, stopping)
            elif model.run_eagerly:
                for _ in range(steps):
                    logs, signals = traced_one(epoch.iterator, stopping)
            else:
                logs, signals = traced_several(epoch.iterator, tf.constant(steps), stopping)
        if strategy.place.num_workers > 1:
            _heed(signals, stop, strategy)
        return logs  # type: ignore[no-any-return]

    return function


def _heed(signals: Signals, stop: Stop, strategy: Strategy) -> None:
    """Does what the other workers' signals ask for, on all workers alike."""
    status = int(signals.status)
    if status == STOPPED:
        stop.agreed = True
        raise StopIteration
    if status == DISAGREED:
        checks = strategy.gather_objects([int(part) for part in signals.check])
        listed = ", ".join(f"worker {i}: {check}" for i, check in enumerate(checks))
        raise DisagreementError(
            "All workers must draw the same batches in the same order. Received batches with "
            f"different checksums: {listed}. The step that met them changed nothing. An "
            "unseeded shuffle is the usual cause: use Dataset.shuffle(..., seed=1), and seed "
            "what a generator or PyDataset draws."
        )


def _over_shares(
    model: Any, strategy: Strategy, step: Callable[..., Any]
) -> Callable[[list[Share]], Any]:
    one_step = _traced(model, lambda share: strategy.run(step, share))

    def function(shares: list[Share]) -> Any:
        with strategy.waiting_for("a step"):
            outputs = [one_step(share) for share in shares]
        return tf.nest.map_structure(lambda *parts: tf.concat(parts, 0), *outputs)

    return function


class _Replica:
    """One replica's steps."""

    def __init__(self, model: Any, strategy: Strategy) -> None:
        self.model = model
        self.strategy = strategy
        self.alone = strategy.place.num_replicas == 1
        self.watched = frozenset(id(v) for v in model.non_trainable_variables)

    def train(self, share: Share, stopping: Tensor) -> tuple[Logs, Signals]:
        """Updates the weights, once."""
        if self.alone:
            return self.model.train_step(share.data), Signals(tf.constant(0), share.check)
        with _keras.on_replica(self._batch(share)) as batch:
            updates = _Updates(self.model, batch, self._agreement(share, stopping))
            metrics = self._metrics_from_zero()
            batch.updates = updates
            logs = self.model.train_step(share.data)
            batch.updates = None
            updates.finish(metrics)
            status = updates.agreement.status
            return self._logs(batch, logs), Signals(status, share.check)

    def test(self, share: Share, stopping: Tensor) -> tuple[Logs, Signals]:
        """Adds a share to the metrics."""
        if self.alone:
            return self.model.test_step(share.data), Signals(tf.constant(0), share.check)
        with _keras.on_replica(self._batch(share)) as batch:
            agreement = self._agreement(share, stopping)
            metrics = self._metrics_from_zero()
            logs = self.model.test_step(share.data)
            metrics.assign(agreement.reduce(batch, metrics.changes(batch)))
            return self._logs(batch, logs), Signals(agreement.status, share.check)

    def predict(self, share: Share) -> Any:
        """Gives the outputs for the whole global batch, in its order."""
        if self.alone:
            return self.model.predict_step(share.data)
        with _keras.on_replica(self._batch(share)):
            outputs = self.model.predict_step(share.data)
            # A share without examples has one row all the same.
            return tf.nest.map_structure(
                lambda output: self.strategy.all_gather(output[: share.rows]), outputs
            )

    def _batch(self, share: Share) -> ReplicaBatch:
        return ReplicaBatch(
            share.rows,
            share.total,
            share.offset,
            self.strategy.all_reduce_sum,
            watched=self.watched,
        )

    def _agreement(self, share: Share, stopping: Tensor) -> _Agreement:
        return _Agreement(self.strategy, share, stopping)

    def _metrics_from_zero(self) -> _Metrics:
        metrics = _Metrics(self.model)
        metrics.clear()
        return metrics

    def _logs(self, batch: ReplicaBatch, logs: Logs) -> Logs:
        """Gives the reduced metrics' results, and the mean of what a step returned besides."""
        results: Logs = self.model.get_metrics_result()
        for metric in self.model.metrics:  # an own step may return {metric.name: ...} of all
            results.setdefault(metric.name, metric.result())
        others = {name: value for name, value in logs.items() if name not in results}
        leaves = [tf.cast(v, tf.float32) * batch.share for v in tf.nest.flatten(others)]
        if leaves:
            others = tf.nest.pack_sequence_as(others, batch.all_reduce(leaves))
        return {name: results[name] if name in results else others[name] for name in logs}


class _Agreement:
    """Whether all workers go on with this step; known after the step's first reduction.

    Attributes:
        status: Scalar int32; see `Signals`.
        needed: Whether there are other workers to agree with.
    """

    def __init__(self, strategy: Strategy, share: Share, stopping: Tensor) -> None:
        self.needed = strategy.place.num_workers > 1
        self.status: Tensor = tf.constant(0)
        self._known = not self.needed
        self._replicas = float(strategy.place.num_replicas)
        self._said = tf.concat([[stopping], share.check, tf.square(share.check)], 0)

    def reduce(self, batch: ReplicaBatch, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sums tensors over all replicas; the first time the signals go with them."""
        if self._known:
            return batch.all_reduce(tensors)
        *reduced, heard = batch.all_reduce([*tensors, self._said])
        stopping, sums, squares = tf.split(heard, [1, 4, 4])
        # Whole numbers below 64: sums of squares are exact in float32 up to 4096 replicas,
        # and equal numbers are the only ones without variance.
        differ = tf.reduce_any(squares * self._replicas != tf.square(sums))
        status = tf.where(differ, DISAGREED, tf.where(stopping[0] > 0, STOPPED, 0))
        self.status, self._known = status, True
        return reduced

    def do(self, action: Callable[[], None]) -> None:
        """Does something if the workers go on."""

        def act() -> Tensor:
            action()
            return tf.constant(True)

        if self.needed:
            tf.cond(tf.equal(self.status, 0), act, lambda: tf.constant(False))
        else:
            action()

    def choose(self, going_on: Tensor, otherwise: Tensor) -> Tensor:
        """Gives one tensor if the workers go on, else the other."""
        return tf.where(tf.equal(self.status, 0), going_on, otherwise)


class _Metrics:
    """The state of the metrics before a step, and what the replica's share adds to it."""

    def __init__(self, model: Any) -> None:
        self.variables = _keras.metric_variables(model)
        self.of_batches = _keras.batch_metric_variables(model)
        self.before = [tf.identity(v.value) for v in self.variables]

    def clear(self) -> None:
        for variable in self.variables:
            variable.assign(tf.zeros_like(variable.value))

    def changes(self, batch: ReplicaBatch) -> list[Tensor]:
        """What the share added: nothing, when it holds no example."""
        return [
            tf.where(
                batch.has_rows,
                v.value * tf.cast(batch.share, v.value.dtype)
                if id(v) in self.of_batches
                else v.value,
                tf.zeros_like(v.value),
            )
            for v in self.variables
        ]

    def assign(self, changes: Sequence[Tensor]) -> None:
        for variable, before, change in zip(self.variables, self.before, changes, strict=True):
            variable.assign(before + change)


class _Updates:
    """Stands between a train step and its optimizers, to reduce before they apply.

    With Keras's `train_step` nothing after the update depends on it, so it waits for the
    metrics and shares their collective. A model's own `train_step` may rely on updated
    weights (a GAN's second half does), so there each update is made at once.
    """

    def __init__(self, model: Any, batch: ReplicaBatch, agreement: _Agreement) -> None:
        self.agreement = agreement
        self._model = model
        self._batch = batch
        self._at_once = _keras.has_own_train_step(model)
        self._scaled: set[int] = set()
        self._waiting: list[tuple[Callable[[list[Tensor]], None], list[Tensor]]] = []

    def scale(self, optimizer: Any, loss: Tensor) -> Tensor:
        # Before the backward pass: collectives inside the model (synchronized
        # BatchNormalization) then carry gradients of the global loss.
        self._scaled.add(id(optimizer))
        return loss * tf.cast(self._batch.share, loss.dtype)

    def apply(
        self, optimizer: Any, grads: list[Tensor], update: Callable[[list[Tensor]], None]
    ) -> None:
        if id(optimizer) not in self._scaled:
            share = self._batch.share
            grads = [g if g is None else g * tf.cast(share, g.dtype) for g in grads]
        self._waiting.append((update, grads))
        if self._at_once:
            self._reduce_and_apply([])

    def _reduce_and_apply(self, with_gradients: Sequence[Tensor]) -> list[Tensor]:
        """Reduces waiting gradients and some tensors in one go, and applies the gradients."""
        grads = [g for _, grads in self._waiting for g in grads if g is not None]
        reduced = iter(self.agreement.reduce(self._batch, [*grads, *with_gradients]))
        ready = [
            (update, [g if g is None else next(reduced) for g in grads])
            for update, grads in self._waiting
        ]
        self._waiting = []
        for update, grads in ready:
            self.agreement.do(functools.partial(update, grads))
        return list(reduced)

    def finish(self, metrics: _Metrics) -> None:
        """Brings metrics, and what else the forward pass changed, to one value everywhere."""
        synchronized = _keras.synchronized_variables(self._model)
        touched = list(self._batch.touched.values())
        differing = [
            variable
            for variable, before in touched
            if before.dtype.is_floating and id(variable) not in synchronized
        ]
        weighted = [
            tf.where(
                self._batch.has_rows,
                v.value * tf.cast(self._batch.share, v.value.dtype),
                tf.zeros_like(v.value),
            )
            for v in differing
        ]
        reduced = self._reduce_and_apply([*weighted, *metrics.changes(self._batch)])
        changes = reduced[len(differing) :]
        for variable, mean in zip(differing, reduced, strict=False):
            variable.assign(mean)
        if self.agreement.needed:
            changes = [self.agreement.choose(c, tf.zeros_like(c)) for c in changes]
            for variable, before in touched:
                variable.assign(self.agreement.choose(variable.value, before))
        metrics.assign(changes)
