"""The signals that workers exchange at each step, and what a worker does about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import tensorflow as tf

from tfdist.data import Epoch, Share
from tfdist.errors import DisagreementError, MembersChanged
from tfdist.step.agreement import (
    DISAGREED,
    MEMBERS_CHANGED,
    STOPPED,
    StepAgreement,
)
from tfdist.strategies.base import Strategy

Tensor = Any


@dataclass
class StopState:
    """Whether a callback or a signal on any worker ends the training.

    Attributes:
        requested: Set by this worker's callbacks. The next step sends it to the others.
        agreed: Set when a step has received a request. That step changes nothing on any
            worker, so all workers stop after the step before it.
        members_changed: Set when the launcher of an elastic run says that processes have
            come or will go.
        preempted: Set when this worker has to leave. The next step sends it to the others.
        leaving: Set when a step has received that. All workers leave after this step.
        warned: Set when this worker asks for a checkpoint. The next step tells the others.
        saving: Set when a step has received that. All workers save after this step.
    """

    requested: bool = False
    agreed: bool = False
    members_changed: bool = False
    preempted: bool = False
    leaving: bool = False
    warned: bool = False
    saving: bool = False

    def requests(self) -> Tensor:
        """Returns the requests that this worker sends: float32 of shape [4]."""
        requests = self.requested, self.members_changed, self.preempted, self.warned
        return tf.constant([float(request) for request in requests])


class Signals(NamedTuple):
    """The result of the signals, which travel in the collective of the gradients.

    Attributes:
        status: Scalar int32; see `StepAgreement`.
        check: This worker's `Share.check`.
        leaving: Scalar bool; see `StepAgreement`.
        saving: Scalar bool; see `StepAgreement`.
        reducing: Scalar float64: seconds that this worker's reduction took. It is not sent.
    """

    status: Tensor
    check: Tensor
    leaving: Tensor
    saving: Tensor
    reducing: Tensor


def no_signals() -> Signals:
    """Returns the signals of a process without other workers."""
    never, seconds = tf.constant(False), tf.zeros([], tf.float64)
    return Signals(tf.constant(0), tf.zeros([4]), never, never, seconds)


def signals_of(agreement: StepAgreement, share: Share) -> Signals:
    """Returns the signals that a step has received.

    Args:
        agreement: The agreement of the step.
        share: The replica's part of the batch.
    """
    return Signals(
        agreement.status, share.check, agreement.leaving, agreement.saving, agreement.seconds
    )


def heed(signals: Signals, stop: StopState, strategy: Strategy, epoch: Epoch) -> None:
    """Acts on the signals of a step. All workers receive the same sums, so all act alike.

    Args:
        signals: The signals of the step.
        stop: The state that is shared with callbacks.
        strategy: The strategy of this process.
        epoch: The epoch of the step.

    Raises:
        StopIteration: A worker asked to stop.
        MembersChanged: Processes came, or are about to go.
        DisagreementError: The workers drew different batches.
    """
    # No error: the step counts, and the training is saved after it.
    stop.leaving, stop.saving = bool(signals.leaving), bool(signals.saving)
    status = int(signals.status)
    # Keras's loop ends at a StopIteration, as if the data had run out. `agreed` tells the
    # difference.
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
