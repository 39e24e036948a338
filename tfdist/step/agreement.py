"""What all workers agree on in a step: the sums of its tensors, and whether the step counts.

The workers' signals, such as a request to stop and a checksum of the batch, share the first
collective of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import tensorflow as tf

from tfdist._keras import ReplicaBatch
from tfdist.data import Share
from tfdist.step import timers
from tfdist.step.exchange import Contribution, Exchange, Sums
from tfdist.strategies.base import Strategy

Tensor = Any
GOES_ON, STOPPED, DISAGREED, MEMBERS_CHANGED = 0, 1, 2, 3


class StepAgreement:
    """The agreement of all workers on a step. It is known after the step's first reduction.

    Args:
        strategy: The strategy on whose replicas the step runs.
        share: The per-replica batch.
        stopping: The result of `StopState.requests` on this worker.
        elements: The number of elements of all gradients of the step, by which the strategy
            decides whether the signals are reduced before the gradients.
        exchange: An extension's exchange and the phase of this step, or None.

    Attributes:
        status: Scalar int32. If it is not `GOES_ON`, the step changes nothing.
        leaving: Scalar bool: whether a worker has to leave. The step is made nevertheless.
        saving: Scalar bool: whether a worker asks for a checkpoint.
        has_peers: Whether there are other workers.
        seconds: Scalar float64: the seconds of reductions, if there are other workers.
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
        self.has_peers = strategy.place.num_workers > 1
        self.status: Tensor = tf.constant(GOES_ON)
        self.leaving: Tensor = tf.constant(False)
        self.saving: Tensor = tf.constant(False)
        self.seconds: Tensor = tf.zeros([], tf.float64)
        self._has_heard = not self.has_peers
        self._exchange = exchange
        self._replicas = float(strategy.place.num_replicas)
        self._signals = tf.concat([stopping, share.check, tf.square(share.check)], 0)
        if self.has_peers and strategy.signals_lead(elements):
            (summed,) = strategy.all_reduce_sum([self._signals])
            self._hear(summed)

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
        """Sums tensors over all replicas. The first reduction also sums the signals."""
        # The signals are the last tensor of the collective. Their position must be the same on
        # all workers, since collectives match tensors by position.
        signals = [] if self._has_heard else [self._signals]
        exact_tensors = [*others, *signals]
        began = timers.now([gradients, exact_tensors]) if self.has_peers else self.seconds
        contribution = Contribution(
            gradients, exact_tensors, batch.share, variables, loss_scales, are_rows, is_applied
        )
        (gradients, others), store_state = self._sums(contribution)
        if self.has_peers:
            self.seconds += timers.now([gradients, others]) - began
        if signals:
            self._hear(others.pop())
        # An exchange changes its state only if the step counts.
        if store_state is not None:
            store_state(self.goes_on)
        return gradients, others

    def _sums(self, contribution: Contribution) -> tuple[Sums, Callable[[Tensor], None] | None]:
        if self._exchange is not None and contribution.gradients:
            exchange, phase = self._exchange
            return exchange.reduce(self._strategy, contribution, phase)
        sums = self._strategy.reduce_step(
            contribution.gradients,
            contribution.others,
            contribution.share,
            contribution.variables,
        )
        return sums, None

    def finish(self) -> None:
        """Ends a step, after its last reduction."""
        if self._exchange is not None:
            self._exchange[0].finish(self.goes_on)

    @property
    def goes_on(self) -> Tensor:
        """Scalar bool: whether the step counts. It is known after the first reduction."""
        return tf.equal(self.status, GOES_ON)

    def _hear(self, summed: Tensor) -> None:
        """Sets the status from the summed signals of all replicas."""
        stopping, sums, squares = tf.split(summed, [4, 4, 4])
        # Checksums are equal on all R replicas exactly if R times the sum of their squares is
        # the square of their sum: their variance is 0 then. Each part of a checksum is a whole
        # number below 64, so these sums are exact in float32 for up to 4096 replicas.
        differ = tf.reduce_any(squares * self._replicas != tf.square(sums))
        status = tf.where(differ, DISAGREED, tf.where(stopping[0] > 0, STOPPED, GOES_ON))
        status = tf.where(stopping[1] > 0, MEMBERS_CHANGED, status)
        self.status, self._has_heard = status, True
        self.leaving, self.saving = stopping[2] > 0, stopping[3] > 0

    def do(self, action: Callable[[], None]) -> None:
        """Calls a function if the step counts."""

        def act() -> Tensor:
            action()
            return tf.constant(True)

        if self.has_peers:
            tf.cond(self.goes_on, act, lambda: tf.constant(False))
        else:
            action()

    def choose(self, going_on: Tensor, otherwise: Tensor) -> Tensor:
        """Returns one tensor if the step counts, else the other."""
        return tf.where(self.goes_on, going_on, otherwise)
