"""The exact reduction of a step: gradients, metric state and statistics.

Each replica contributes sums, and all replicas get the totals. Gradients, the state of metrics,
changed statistics and the workers' signals share one collective if the train step allows it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from tfdist import _keras
from tfdist._keras import ReplicaBatch
from tfdist.step.agreement import StepAgreement
from tfdist.strategies.base import Strategy

Tensor = Any


class MetricState:
    """The metrics that a step updates, their state before it, and the replica's changes.

    Args:
        from_zero: Whether the state of metrics is 0 when the step begins, so that the sums over
            replicas are exact. Otherwise it is that of the epoch so far. A custom `train_step`
            may use the results of its metrics, so there it is that of the epoch.
    """

    def __init__(self, from_zero: bool) -> None:
        self._from_zero = from_zero
        self._before: dict[int, tuple[Any, Tensor]] = {}

    def begin(self, variables: Sequence[Any]) -> None:
        """Records the state of a metric before its first update in the step."""
        for variable in variables:
            if id(variable) not in self._before:
                before = tf.identity(variable.value)
                self._before[id(variable)] = variable, before
                if self._from_zero:
                    variable.assign(tf.zeros_like(before))

    def changes(self, batch: ReplicaBatch) -> list[Tensor]:
        """Returns the changes by the replica's batch. They are 0 if it has no example."""
        return [
            tf.where(
                batch.has_rows,
                variable.value if self._from_zero else variable.value - before,
                tf.zeros_like(before),
            )
            for variable, before in self._before.values()
        ]

    def assign(self, changes: Sequence[Tensor]) -> None:
        """Adds the changes of all replicas to the state before the step."""
        states = self._before.values()
        for (variable, before), change in zip(states, changes, strict=True):
            variable.assign(before + change)


class _Waiting(NamedTuple):
    """An update that waits for the reduction of its gradients."""

    update: Callable[[list[Tensor]], None]
    grads: list[Tensor]
    variables: Sequence[Any]
    loss_scale: Tensor | None

    def pairs(self) -> list[tuple[Tensor, Any]]:
        """Returns the gradients that are not None, each with its variable."""
        gradients_and_variables = zip(self.grads, self.variables, strict=True)
        return [
            (gradient, variable)
            for gradient, variable in gradients_and_variables
            if gradient is not None
        ]


def _of_rows(gradient: Tensor, total: Tensor, has_fixed_rows: bool) -> Tensor:
    """Gives a reduced gradient the rows that one process would have.

    Args:
        gradient: The replica's gradient.
        total: The sum over all replicas.
        has_fixed_rows: Whether all replicas have the same rows, whose values alone were summed.
    """
    if has_fixed_rows:
        return tf.IndexedSlices(total, gradient.indices, gradient.dense_shape)
    # Gathered rows of several replicas may repeat. An optimizer that gets unique rows from one
    # process would update a repeated row several times.
    return _keras.once_each(total) if _keras.has_unique_rows(gradient) else total


class ReducedUpdates:
    """Reduces gradients between a train step and its optimizers.

    In Keras's `train_step` nothing after the update depends on it. So the update waits for the
    metrics, and shares their collective. A custom `train_step` may use updated weights, as the
    second half of a GAN's step does. So there each update is made at once.

    Args:
        model: The model that is trained.
        batch: The description of the per-replica batch.
        agreement: The agreement of the workers on this step.
        strategy: The strategy on whose replicas the step runs.
        are_parts: Whether gradients are already parts of the global gradient, which is their
            sum over all replicas.
    """

    def __init__(
        self,
        model: Any,
        batch: ReplicaBatch,
        agreement: StepAgreement,
        strategy: Strategy,
        are_parts: bool = False,
    ) -> None:
        self.agreement = agreement
        self._strategy = strategy
        self._model = model
        self._batch = batch
        self._at_once = _keras.has_own(model, "train_step")
        self._are_parts = are_parts
        self._has_float16 = _keras.computes_in(model, "float16")
        self._scaled: set[int] = set()
        self._waiting: list[_Waiting] = []

    def scale(self, optimizer: Any, loss: Tensor) -> Tensor:
        """Returns the loss as the replica's part of the global loss."""
        # Before the backward pass: collectives inside the model (synchronized
        # BatchNormalization) then carry gradients of the global loss. And gradients of
        # activations have the size that they have in one process, so that float16 overflows
        # where it does there.
        self._scaled.add(id(optimizer))
        # An own `train_step` may take gradients of other losses too.
        self._batch.is_weighed = not self._at_once
        return loss * self._batch.share_as(loss.dtype)

    def apply(
        self,
        optimizer: Any,
        grads: list[Tensor],
        update: Callable[[list[Tensor]], None],
        variables: Sequence[Any],
    ) -> None:
        """Stores the replica's gradients for the reduction, or reduces and applies them now."""
        if not self._are_parts and id(optimizer) not in self._scaled:
            batch = self._batch
            grads = [g if g is None else g * batch.share_as(g.dtype) for g in grads]
        scale = getattr(optimizer, "dynamic_scale", None)
        scale = None if scale is None else tf.convert_to_tensor(scale)
        self._waiting.append(_Waiting(update, grads, variables, scale))
        if self._at_once:
            self._reduce_and_apply([])

    def _reduce_and_apply(self, with_gradients: Sequence[Tensor]) -> list[Tensor]:
        """Reduces waiting gradients and other tensors together, and applies the gradients."""
        pairs = [pair for waiting in self._waiting for pair in waiting.pairs()]
        scales = [waiting.loss_scale for waiting in self._waiting for _ in waiting.pairs()]
        gradients = [gradient for gradient, _ in pairs]
        are_fixed = [_keras.has_fixed_rows(gradient) for gradient in gradients]
        parts = [g.values if fix else g for g, fix in zip(gradients, are_fixed, strict=True)]
        summed, others = self.agreement.reduce(
            self._batch,
            parts,
            with_gradients,
            [v for _, v in pairs],
            scales,
            are_fixed,
            is_applied=not self._are_parts,  # an extension's own step goes on with the sums
        )
        if self._has_float16:
            summed = [
                s if scale is None else _keras.overflowing_as(gradient, s)
                for gradient, s, scale in zip(gradients, summed, scales, strict=True)
            ]
        reduced = iter(map(_of_rows, gradients, summed, are_fixed))
        updates = [
            functools.partial(w.update, [g if g is None else next(reduced) for g in w.grads])
            for w in self._waiting
        ]
        self._waiting = []
        for update in updates:
            self._strategy.update(functools.partial(self.agreement.do, update))
        return others

    def finish(self, metrics: MetricState) -> None:
        """Makes metrics, and variables that the forward pass changed, equal on all replicas."""
        synchronized = _keras.synchronized_variables(self._model)
        touched = list(self._batch.touched.values())
        differing = [
            (variable, before)
            for variable, before in touched
            if before.dtype.is_floating and id(variable) not in synchronized
        ]
        # If the forward pass has changed a weight, its update starts from the changed value. So
        # the means of such weights need a collective of their own, before the updates.
        weights = [pair for pair in differing if pair[0].trainable and self._waiting]
        if weights:
            _, means = self.agreement.reduce(self._batch, [], self._weighed(weights))
            self._assign(weights, means)
            differing = [pair for pair in differing if not pair[0].trainable]
        parts = self._weighed(differing)
        reduced = self._reduce_and_apply([*parts, *metrics.changes(self._batch)])
        self.agreement.finish()
        changes = reduced[len(differing) :]
        self._assign(differing, reduced)
        if self.agreement.has_peers:
            # A step that does not count changes nothing: variables get their values before it.
            changes = [self.agreement.choose(c, tf.zeros_like(c)) for c in changes]
            for variable, before in touched:
                variable.assign(self.agreement.choose(variable.value, before))
        metrics.assign(changes)

    def _weighed(self, touched: Sequence[tuple[Any, Tensor]]) -> list[Tensor]:
        """Returns the replica's parts of the means of variables over all examples."""
        return [
            tf.where(
                self._batch.has_rows,
                variable.value * self._batch.share_as(variable.value.dtype),
                tf.zeros_like(variable.value),
            )
            for variable, _ in touched
        ]

    def _assign(self, touched: Sequence[tuple[Any, Tensor]], means: Sequence[Tensor]) -> None:
        for (variable, before), mean in zip(touched, means, strict=False):
            variable.assign(tf.where(self._batch.total > 0, mean, before))
