"""The train, test and predict steps that every strategy runs.

A step is Keras's own `train_step`, run on each replica's share of the global batch, with
one exact reduction: each replica's loss is scaled by its part of the batch, so gradients
are summed and need no division; metrics are summed as state; both travel together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from tfdist import _keras
from tfdist._keras import ReplicaBatch
from tfdist.data import Epoch, Share
from tfdist.strategies.base import Strategy

Tensor = Any
Logs = dict[str, Tensor]


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
        test=_over_epoch(model, strategy, replica.test, None),
        predict=_over_shares(model, strategy, replica.predict),
    )


def _traced(model: Any, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    if model.run_eagerly:
        return function
    traced: Callable[..., Any] = tf.function(function, reduce_retracing=True, **options)
    return traced


def _over_epoch(
    model: Any, strategy: Strategy, step: Callable[..., Any], stop: Stop | None
) -> Callable[[Epoch], Logs]:
    """Wraps a replica's step into a function of an epoch, `steps_per_execution` at a time."""
    alone = strategy.place.num_replicas == 1

    @tf.autograph.experimental.do_not_convert
    def one_step(share: Share, stopping: Tensor) -> tuple[Logs, Tensor]:
        with contextlib.nullcontext() if alone else _keras.tracing(model):
            result: tuple[Logs, Tensor] = strategy.run(step, share, stopping)
        return result

    one_step = _traced(model, one_step, jit_compile=alone and model.jit_compile)

    @tf.autograph.experimental.do_not_convert
    def one(iterator: Any, stopping: Tensor) -> tuple[Logs, Tensor]:
        return one_step(iterator.get_next(), stopping)

    @tf.autograph.experimental.do_not_convert
    def several(iterator: Any, steps: Tensor, stopping: Tensor) -> tuple[Logs, Tensor]:
        first = one(iterator, stopping)

        def again(done: Tensor, _: Any) -> tuple[Tensor, Any]:
            return done + 1, one(iterator, stopping)

        _, last = tf.while_loop(lambda done, _: done < steps, again, (1, first))
        return last  # type: ignore[no-any-return]

    one, several = _traced(model, one), _traced(model, several)

    def function(epoch: Epoch) -> Logs:
        steps = epoch.take(model.steps_per_execution)
        stopping = float(stop is not None and stop.requested)
        if model.run_eagerly:
            for _ in range(steps):
                logs, stopped = one(epoch.iterator, stopping)
        elif model.steps_per_execution == 1:
            logs, stopped = one(epoch.iterator, tf.constant(stopping))
        else:
            logs, stopped = several(epoch.iterator, tf.constant(steps), tf.constant(stopping))
        if stop is not None and strategy.place.num_workers > 1 and stopped > 0:
            stop.agreed = True
            raise StopIteration
        return logs

    return function


def _over_shares(
    model: Any, strategy: Strategy, step: Callable[..., Any]
) -> Callable[[list[Share]], Any]:
    @tf.autograph.experimental.do_not_convert
    def one_step(share: Share) -> Any:
        with (
            contextlib.nullcontext()
            if strategy.place.num_replicas == 1
            else _keras.tracing(model)
        ):
            return strategy.run(step, share)

    one_step = _traced(model, one_step)

    def function(shares: list[Share]) -> Any:
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

    def train(self, share: Share, stopping: Tensor) -> tuple[Logs, Tensor]:
        """Updates the weights, once."""
        if self.alone:
            return self.model.train_step(share.data), stopping
        with _keras.on_replica(self._batch(share)) as batch:
            updates = _Updates(
                self.model,
                batch,
                stopping,
                at_once=_keras.has_own_train_step(self.model),
                can_stop=self.strategy.place.num_workers > 1,
            )
            metrics = self._metrics_from_zero()
            batch.updates = updates
            logs = self.model.train_step(share.data)
            batch.updates = None
            updates.finish(metrics)
            return self._logs(batch, logs), updates.stopping

    def test(self, share: Share, stopping: Tensor) -> tuple[Logs, Tensor]:
        """Adds a share to the metrics."""
        if self.alone:
            return self.model.test_step(share.data), stopping
        with _keras.on_replica(self._batch(share)) as batch:
            metrics = self._metrics_from_zero()
            logs = self.model.test_step(share.data)
            metrics.assign(batch.all_reduce(metrics.changes(batch)))
            return self._logs(batch, logs), stopping

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
            share.rows, share.total, share.offset, self.strategy.all_reduce_sum, self.watched
        )

    def _metrics_from_zero(self) -> _Metrics:
        metrics = _Metrics(_keras.metric_variables(self.model))
        metrics.clear()
        return metrics

    def _logs(self, batch: ReplicaBatch, logs: Logs) -> Logs:
        """Gives the metrics' results, and the mean of what a step returned besides them."""
        results: Logs = self.model.get_metrics_result()
        others = {name: value for name, value in logs.items() if name not in results}
        if others:
            weighted = [tf.cast(v, tf.float32) * batch.share for v in others.values()]
            means = batch.all_reduce(weighted)
            others = dict(zip(others, means, strict=True))
        return {name: results.get(name, others.get(name)) for name in logs} or results


class _Metrics:
    """The state of the metrics before a step, and what the replica's share adds to it."""

    def __init__(self, variables: Sequence[Any]) -> None:
        self.variables = variables
        self.before = [tf.identity(v.value) for v in variables]

    def clear(self) -> None:
        for variable in self.variables:
            variable.assign(tf.zeros_like(variable.value))

    def changes(self, batch: ReplicaBatch) -> list[Tensor]:
        """What the share added: nothing, when it holds no example."""
        return [
            tf.where(batch.has_rows, v.value, tf.zeros_like(v.value)) for v in self.variables
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

    def __init__(
        self,
        model: Any,
        batch: ReplicaBatch,
        stopping: Tensor,
        *,
        at_once: bool,
        can_stop: bool,
    ) -> None:
        self.model = model
        self.batch = batch
        self.stopping = stopping
        self.at_once = at_once
        self.can_stop = can_stop
        self.scaled: set[int] = set()
        self.waiting: list[tuple[Callable[[list[Tensor]], None], list[Tensor]]] = []

    def scale(self, optimizer: Any, loss: Tensor) -> Tensor:
        # Before the backward pass: collectives inside the model (synchronized
        # BatchNormalization) then carry gradients of the global loss.
        self.scaled.add(id(optimizer))
        return loss * tf.cast(self.batch.share, loss.dtype)

    def apply(
        self, optimizer: Any, grads: list[Tensor], update: Callable[[list[Tensor]], None]
    ) -> None:
        if id(optimizer) not in self.scaled:
            share = self.batch.share
            grads = [g if g is None else g * tf.cast(share, g.dtype) for g in grads]
        self.waiting.append((update, grads))
        if self.at_once:
            self._reduce_and_apply([])

    def _reduce_and_apply(self, with_gradients: Sequence[Tensor]) -> list[Tensor]:
        """Reduces waiting gradients and some tensors in one go, and applies the gradients."""
        grads = [g for _, grads in self.waiting for g in grads if g is not None]
        reduced = iter(self.batch.all_reduce([*grads, *with_gradients, self.stopping]))
        waiting, self.waiting = self.waiting, []
        ready = [
            (update, [g if g is None else next(reduced) for g in grads])
            for update, grads in waiting
        ]
        *rest, self.stopping = reduced

        def apply_all() -> Tensor:
            for update, grads in ready:
                update(grads)
            return tf.constant(True)

        if self.can_stop:
            tf.cond(self.stopping > 0, lambda: tf.constant(False), apply_all)
        else:
            apply_all()
        return rest

    def finish(self, metrics: _Metrics) -> None:
        """Brings metrics, and what else the forward pass changed, to one value everywhere."""
        synchronized = _keras.synchronized_variables(self.model)
        touched = list(self.batch.touched.values())
        differing = [
            variable
            for variable, before in touched
            if before.dtype.is_floating and id(variable) not in synchronized
        ]
        weighted = [
            tf.where(
                self.batch.has_rows,
                v.value * tf.cast(self.batch.share, v.value.dtype),
                tf.zeros_like(v.value),
            )
            for v in differing
        ]
        reduced = self._reduce_and_apply([*weighted, *metrics.changes(self.batch)])
        for variable, mean in zip(differing, reduced, strict=False):
            variable.assign(mean)
        changes = reduced[len(differing) :]
        if self.can_stop:
            changes = [tf.where(self.stopping > 0, tf.zeros_like(c), c) for c in changes]
            for variable, before in touched:
                variable.assign(tf.where(self.stopping > 0, before, variable.value))
        metrics.assign(changes)
