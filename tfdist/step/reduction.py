"""The exact reduction: what a replica contributes to a step, and what all make of it.

Gradients, metrics' state, changed statistics and the workers' signals to each other travel
in one collective where the train step allows it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from tfdist import _keras
from tfdist._keras import ReplicaBatch
from tfdist.data import Share
from tfdist.step import timers
from tfdist.step.exchange import Contribution, Exchange, Sums
from tfdist.strategies.base import Strategy

Tensor = Any
GOES_ON, STOPPED, DISAGREED, MEMBERS_CHANGED = 0, 1, 2, 3


class StepAgreement:
    """Whether all workers go on with this step; known after the step's first reduction.

    Args:
        strategy: Where the replica is.
        share: Its share of the batch.
        stopping: Whether this worker was asked to stop, whether members changed, and whether
            this worker has to leave.
        elements: Of all gradients that will be reduced; by it the strategy decides whether
            to learn of the others' signals ahead.
        exchange: What an extension puts around the reduction, and the kind of this step.

    Attributes:
        status: Scalar int32: `GOES_ON`; else nothing changes in this step.
        leaving: Scalar bool: whether a worker has to leave. This step is made all the same.
        needed: Whether there are other workers to agree with.
        seconds: Scalar float64: how long reductions took, if there are other workers.
    """

    def __init__(
        self,
        strategy: Strategy,
        share: Share,
        stopping: Tensor,
        elements: int = 0,
        exchange: tuple[Exchange, Hashable] | None = None,
    ) -> None:
        self._strategy = strategy
        self.needed = strategy.place.num_workers > 1
        self.status: Tensor = tf.constant(GOES_ON)
        self.leaving: Tensor = tf.constant(False)
        self.seconds: Tensor = tf.zeros([], tf.float64)
        self._known = not self.needed
        self._exchange = exchange
        self._replicas = float(strategy.place.num_replicas)
        self._said = tf.concat([stopping, share.check, tf.square(share.check)], 0)
        if self.needed and strategy.signals_lead(elements):
            (heard,) = strategy.all_reduce_sum([self._said])
            self._hear(heard)

    def reduce(
        self,
        batch: ReplicaBatch,
        gradients: Sequence[Tensor],
        others: Sequence[Tensor],
        variables: Sequence[Any] = (),
        loss_scales: Sequence[Tensor | None] = (),
        are_rows: Sequence[bool] = (),
        is_applied: bool = True,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Sums tensors over all replicas; the first time the signals go with them."""
        said = [] if self._known else [self._said]
        sent = [*others, *said]
        arrived = timers.now([gradients, sent]) if self.needed else self.seconds
        given = Contribution(
            gradients, sent, batch.share, variables, loss_scales, are_rows, is_applied
        )
        (gradients, others), keep = self._sums(given)
        if self.needed:
            self.seconds += timers.now([gradients, others]) - arrived
        if said:
            self._hear(others.pop())
        if keep is not None:
            keep(self.goes_on)
        return gradients, others

    def _sums(self, given: Contribution) -> tuple[Sums, Callable[[Tensor], None] | None]:
        if self._exchange is not None and given.gradients:
            exchange, phase = self._exchange
            return exchange.reduce(self._strategy, given, phase)
        sums = self._strategy.reduce_step(
            given.gradients, given.others, given.share, given.variables
        )
        return sums, None

    def finish(self) -> None:
        """Ends a step, after its last reduction."""
        if self._exchange is not None:
            self._exchange[0].finish(self.goes_on)

    @property
    def goes_on(self) -> Tensor:
        """Scalar bool: whether the step counts; known after the first reduction."""
        return tf.equal(self.status, GOES_ON)

    def _hear(self, heard: Tensor) -> None:
        stopping, sums, squares = tf.split(heard, [3, 4, 4])
        # Whole numbers below 64: sums of squares are exact in float32 up to 4096 replicas,
        # and equal numbers are the only ones without variance.
        differ = tf.reduce_any(squares * self._replicas != tf.square(sums))
        status = tf.where(differ, DISAGREED, tf.where(stopping[0] > 0, STOPPED, GOES_ON))
        status = tf.where(stopping[1] > 0, MEMBERS_CHANGED, status)
        self.status, self.leaving, self._known = status, stopping[2] > 0, True

    def do(self, action: Callable[[], None]) -> None:
        """Does something if the workers go on."""

        def act() -> Tensor:
            action()
            return tf.constant(True)

        if self.needed:
            tf.cond(self.goes_on, act, lambda: tf.constant(False))
        else:
            action()

    def choose(self, going_on: Tensor, otherwise: Tensor) -> Tensor:
        """Gives one tensor if the workers go on, else the other."""
        return tf.where(self.goes_on, going_on, otherwise)


class MetricState:
    """The metrics that a step updates: their state before, and what the share adds to it.

    Args:
        from_zero: Whether a metric's state is only the share's while the step runs. Then its
            sums are exact; else results that a step computes with are those of the epoch.
    """

    def __init__(self, from_zero: bool) -> None:
        self._from_zero = from_zero
        self._before: dict[int, tuple[Any, Tensor]] = {}

    def begin(self, variables: Sequence[Any]) -> None:
        """Notes the state of a metric that is about to be updated."""
        for variable in variables:
            if id(variable) not in self._before:
                before = tf.identity(variable.value)
                self._before[id(variable)] = variable, before
                if self._from_zero:
                    variable.assign(tf.zeros_like(before))

    def changes(self, batch: ReplicaBatch) -> list[Tensor]:
        """What the share added: nothing, when it holds no example."""
        return [
            tf.where(
                batch.has_rows,
                variable.value if self._from_zero else variable.value - before,
                tf.zeros_like(before),
            )
            for variable, before in self._before.values()
        ]

    def assign(self, changes: Sequence[Tensor]) -> None:
        """Adds what all shares added to the state before."""
        states = self._before.values()
        for (variable, before), change in zip(states, changes, strict=True):
            variable.assign(before + change)


class _Waiting(NamedTuple):
    """An update that needs its gradients reduced."""

    update: Callable[[list[Tensor]], None]
    grads: list[Tensor]
    variables: Sequence[Any]
    loss_scale: Tensor | None

    def pairs(self) -> list[tuple[Tensor, Any]]:
        """Gives the gradients that there are, each with its variable."""
        both = zip(self.grads, self.variables, strict=True)
        return [(gradient, variable) for gradient, variable in both if gradient is not None]


def _of_rows(own: Tensor, total: Tensor, has_fixed_rows: bool) -> Tensor:
    """Gives a reduced gradient the rows that one process would have."""
    if has_fixed_rows:
        return tf.IndexedSlices(total, own.indices, own.dense_shape)
    return _keras.once_each(total) if _keras.has_unique_rows(own) else total


class ReducedUpdates:
    """Stands between a train step and its optimizers, to reduce before they apply.

    With Keras's `train_step` nothing after the update depends on it, so it waits for the
    metrics and shares their collective. A model's own `train_step` may rely on updated
    weights (a GAN's second half does), so there each update is made at once.

    Args:
        model: The model that is trained.
        batch: The replica's share.
        agreement: Whether the workers go on.
        strategy: Where the replica is.
        are_parts: Whether gradients come as parts of the global one, which add up to it.
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
        # In float16 a sum over fewer rows overflows later than that of one process. In float32
        # the sum over all replicas overflows as it does.
        has_float16 = any(layer.compute_dtype == "float16" for layer in _keras.layers_of(model))
        self._is_afterwards = has_float16 and not _keras.synchronized_variables(model)
        self._scaled: set[int] = set()
        self._waiting: list[_Waiting] = []

    def scale(self, optimizer: Any, loss: Tensor) -> Tensor:
        """Makes the loss the share's part of the global loss."""
        # The share's mean overflows in float16 about where one process's does.
        if self._is_afterwards and hasattr(optimizer, "dynamic_scale"):
            return loss
        # Before the backward pass: collectives inside the model (synchronized
        # BatchNormalization) then carry gradients of the global loss.
        self._scaled.add(id(optimizer))
        return loss * tf.cast(self._batch.share, loss.dtype)

    def apply(
        self,
        optimizer: Any,
        grads: list[Tensor],
        update: Callable[[list[Tensor]], None],
        variables: Sequence[Any],
    ) -> None:
        """Keeps the share's gradients for the reduction, or reduces and applies them now."""
        if not self._are_parts and id(optimizer) not in self._scaled:
            share = self._batch.share
            grads = [g if g is None else g * tf.cast(share, g.dtype) for g in grads]
        scale = getattr(optimizer, "dynamic_scale", None)
        scale = None if scale is None else tf.convert_to_tensor(scale)
        self._waiting.append(_Waiting(update, grads, variables, scale))
        if self._at_once:
            self._reduce_and_apply([])

    def _reduce_and_apply(self, with_gradients: Sequence[Tensor]) -> list[Tensor]:
        """Reduces waiting gradients and some tensors in one go, and applies the gradients."""
        pairs = [pair for waiting in self._waiting for pair in waiting.pairs()]
        scales = [waiting.loss_scale for waiting in self._waiting for _ in waiting.pairs()]
        gradients = [gradient for gradient, _ in pairs]
        are_fixed = [_keras.has_fixed_rows(gradient) for gradient in gradients]
        sent = [g.values if fixed else g for g, fixed in zip(gradients, are_fixed, strict=True)]
        summed, others = self.agreement.reduce(
            self._batch,
            sent,
            with_gradients,
            [v for _, v in pairs],
            scales,
            are_fixed,
            is_applied=not self._are_parts,  # an extension's own step goes on with the sums
        )
        reduced = iter(map(_of_rows, gradients, summed, are_fixed))
        ready = [
            functools.partial(w.update, [g if g is None else next(reduced) for g in w.grads])
            for w in self._waiting
        ]
        self._waiting = []
        for update in ready:
            self._strategy.update(functools.partial(self.agreement.do, update))
        return others

    def finish(self, metrics: MetricState) -> None:
        """Brings metrics, and what else the forward pass changed, to one value everywhere."""
        synchronized = _keras.synchronized_variables(self._model)
        touched = list(self._batch.touched.values())
        differing = [
            (variable, before)
            for variable, before in touched
            if before.dtype.is_floating and id(variable) not in synchronized
        ]
        # What the forward pass made of a weight, its update starts from.
        weights = [pair for pair in differing if pair[0].trainable and self._waiting]
        if weights:
            _, means = self.agreement.reduce(self._batch, [], self._weighed(weights))
            self._assign(weights, means)
            differing = [pair for pair in differing if not pair[0].trainable]
        weighed = self._weighed(differing)
        reduced = self._reduce_and_apply([*weighed, *metrics.changes(self._batch)])
        self.agreement.finish()
        changes = reduced[len(differing) :]
        self._assign(differing, reduced)
        if self.agreement.needed:
            changes = [self.agreement.choose(c, tf.zeros_like(c)) for c in changes]
            for variable, before in touched:
                variable.assign(self.agreement.choose(variable.value, before))
        metrics.assign(changes)

    def _weighed(self, touched: Sequence[tuple[Any, Tensor]]) -> list[Tensor]:
        """Gives the share's part of what variables are on all replicas."""
        return [
            tf.where(
                self._batch.has_rows,
                variable.value * tf.cast(self._batch.share, variable.value.dtype),
                tf.zeros_like(variable.value),
            )
            for variable, _ in touched
        ]

    def _assign(self, touched: Sequence[tuple[Any, Tensor]], means: Sequence[Tensor]) -> None:
        for (variable, before), mean in zip(touched, means, strict=False):
            variable.assign(tf.where(self._batch.total > 0, mean, before))
