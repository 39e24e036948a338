"""What the workers tell each other at every step, and what they do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import tensorflow as tf

from tfdist.data import Epoch, Share
from tfdist.errors import DisagreementError, MembersChanged
from tfdist.step.reduction import (
    DISAGREED,
    MEMBERS_CHANGED,
    STOPPED,
    StepAgreement,
)
from tfdist.strategies.base import Strategy

Tensor = Any


@dataclass
class Stop:
    """Whether a callback of this or of another worker asked to stop.

    Attributes:
        requested: Set by this worker's callbacks; goes out with the next step.
        agreed: Set when a step learned of a request: that step changed nothing, on any
            worker, so all of them stop after the one before.
        members_changed: Set when an elastic run's launcher said that processes came or go.
        preempted: Set when this worker has to leave; goes out with the next step.
        leaving: Set when a step learned of that: all workers leave after it.
    """

    requested: bool = False
    agreed: bool = False
    members_changed: bool = False
    preempted: bool = False
    leaving: bool = False

    def asked(self) -> Tensor:
        """Gives what this worker tells the others: float32 of shape [3]."""
        return tf.constant(
            [float(signal) for signal in (self.requested, self.members_changed, self.preempted)]
        )


class Signals(NamedTuple):
    """What the workers tell each other at every step, in the gradients' collective.

    Attributes:
        status: Scalar int32; see `StepAgreement`.
        check: This worker's `Share.check`.
        leaving: Scalar bool; see `StepAgreement`.
        reducing: Scalar float64, seconds that this worker's reduction took; no signal.
    """

    status: Tensor
    check: Tensor
    leaving: Tensor
    reducing: Tensor


def no_signals() -> Signals:
    """Gives the signals of a process that has nobody to tell."""
    return Signals(tf.constant(0), tf.zeros([4]), tf.constant(False), tf.zeros([], tf.float64))


def signals_of(agreement: StepAgreement, share: Share) -> Signals:
    """Gives what a step has learned of the other workers.

    Args:
        agreement: Of the step.
        share: The replica's part of the batch.
    """
    return Signals(agreement.status, share.check, agreement.leaving, agreement.seconds)


def heed(signals: Signals, stop: Stop, strategy: Strategy, epoch: Epoch) -> None:
    """Does what the other workers' signals ask for, on all workers alike.

    Args:
        signals: Of the step that was made.
        stop: Shared with the callbacks.
        strategy: Where the replicas are.
        epoch: The epoch of the step.

    Raises:
        StopIteration: A worker asked to stop.
        MembersChanged: Processes came, or are about to go.
        DisagreementError: The workers drew different batches.
    """
    stop.leaving = bool(signals.leaving)
    status = int(signals.status)
    if status == STOPPED:
        stop.agreed = True
        raise StopIteration
    if status == MEMBERS_CHANGED:
        raise MembersChanged("Processes came, or are about to go.")
    if status == DISAGREED:
        checks = strategy.gather_objects([int(part) for part in signals.check])
        listed = ", ".join(f"worker {i}: {check}" for i, check in enumerate(checks))
        raise DisagreementError(
            "All workers must draw the same batches in the same order. Received batches with "
            f"different checksums at step {epoch.steps_taken}: {listed}. The step changed "
            f"nothing. {_remedy(epoch.suspects)}"
        )


def _remedy(suspects: Sequence[str]) -> str:
    if not suspects:
        return "Seed what a generator or PyDataset draws, and sort what it lists."
    return (
        f"The data set has {', '.join(suspects)}: seed them, and let them depend on nothing "
        "that differs between workers, such as the time, the order of files or of a set."
    )
