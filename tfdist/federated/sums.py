"""The sums over all replicas of what their clients have contributed to a round."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import tensorflow as tf

from tfdist import _keras
from tfdist.federated.masks import PairwiseMasks
from tfdist.federated.plan import OfReplica
from tfdist.federated.protection import UpdateMechanism
from tfdist.federated.secure_sum import STATE, FixedPoint, SecureSum
from tfdist.step.agreement import StepAgreement
from tfdist.strategies.base import Strategy

Tensor = Any
CLIPPED = "secure_sum_clipped"
NOT_CANCELLED = "The masks of a secure sum have not cancelled"


class Sums(NamedTuple):
    """What the clients of a replica, or of all, have contributed; in the order of `LocalState`.

    Attributes:
        trained: Updates of trainable weights.
        averaged: Updates of statistics of layers, and votes for what protects clients.
        counted: What was added to whole numbers.
        metrics: What was added to the state of metrics.
    """

    trained: list[Tensor]
    averaged: list[Tensor]
    counted: list[Tensor]
    metrics: list[Tensor]


class RoundSums:
    """Sums over replicas.

    Args:
        strategy: The strategy of the replicas.
        variables: The `keras.Variable`s of `Sums.trained`.
        protection: What protects clients, or None.
        secure: The settings and the masks of a secure sum, or None.
    """

    def __init__(
        self,
        strategy: Strategy,
        variables: Sequence[Any],
        protection: UpdateMechanism | None,
        secure: tuple[SecureSum, PairwiseMasks] | None,
    ) -> None:
        self._strategy = strategy
        self._variables = list(variables)
        self._protection = protection
        self._secure: MaskedSums | None = None
        if secure is not None:
            settings, masks = secure
            self._secure = MaskedSums(settings, masks, strategy)

    def over_replicas(
        self, agreement: StepAgreement, share: OfReplica, own: Sums
    ) -> tuple[Sums, dict[str, Tensor]]:
        """Sums up. The weights of clients add up to 1, so the sum is the mean.

        Args:
            agreement: The agreement of the workers on the round.
            share: What this replica does in the round.
            own: What its clients have contributed.

        Returns:
            The sums of all replicas, and values for the logs.
        """
        held, of_all = tf.unstack(share.held, 2)
        sums = self._strategy.all_reduce_sum, self._strategy.all_gather
        batch = _keras.ReplicaBatch(held, of_all, tf.constant(0, tf.int64), *sums)
        weights, statistics = len(own.trained), len(own.averaged)
        updates = [*own.trained, *own.averaged]
        if self._protection is not None:
            updates = self._protection.release(updates)
        others = [*own.counted, *own.metrics]
        logs: dict[str, Tensor] = {}
        if self._secure is not None:
            are_whole = self._protection is not None and self._protection.sends_whole_numbers
            message = self._secure.message(share.number, updates, others, are_whole)
            _, received = agreement.reduce(batch, [], message.vectors)
            totals, others, logs[CLIPPED] = message.read(received)
        else:
            sent = updates[:weights], [*updates[weights:], *others]
            scales = [None] * weights
            trained, rest = agreement.reduce(batch, *sent, self._variables, scales)
            totals, others = [*trained, *rest[:statistics]], rest[statistics:]
        if self._protection is not None:
            totals = self._protection.mean(totals)
        like = [*own.trained, *own.averaged]
        totals = [tf.cast(t, v.dtype) for t, v in zip(totals, like, strict=True)]
        counted = len(own.counted)
        split = totals[:weights], totals[weights:], others[:counted], others[counted:]
        return Sums(*split), logs


class MaskedSums:
    """Makes the messages of a secure sum.

    Args:
        settings: The settings.
        masks: The masks of this worker.
        strategy: The strategy of the replicas.
    """

    def __init__(self, settings: SecureSum, masks: PairwiseMasks, strategy: Strategy) -> None:
        self._settings = settings
        self._masks = masks
        self._strategy = strategy

    def message(
        self,
        number: Tensor,
        updates: Sequence[Tensor],
        others: Sequence[Tensor],
        are_whole: bool = False,
    ) -> Message:
        """Returns what a replica sends.

        Args:
            number: The number of the round, scalar int64.
            updates: Updates of weights, in floating point.
            others: State of metrics in floating point, and whole numbers.
            are_whole: Whether the updates are whole numbers.
        """
        settings = self._settings
        of_updates = settings.of_whole_numbers if are_whole else settings.of_updates
        encoded, clipped = of_updates.encode(_flat(updates, tf.float64))
        parts = []
        for other in others:
            if other.dtype.is_floating:
                words, out_of_range = STATE.encode(_flat([other], tf.float64))
                part = tf.reshape(words, [-1])
                clipped += out_of_range
            else:
                part = _flat([other], tf.int64)
            parts.append(part)
        # The last one is the number of replicas in the sum, if the masks have cancelled.
        counts = tf.stack([clipped, tf.constant(1, tf.int64)])
        plain = [encoded, tf.concat([*parts, counts], 0)]
        place = self._strategy.place
        lane = tf.cast(self._strategy.replica_id(), tf.int64) - place.first_replica
        with tf.device("CPU:0"):
            masked = tf.numpy_function(
                self._add_masks, [number, lane, *plain], [vector.dtype for vector in plain]
            )
        vectors = [tf.ensure_shape(m, v.shape) for m, v in zip(masked, plain, strict=True)]
        return Message(vectors, of_updates, list(updates), list(others), place.num_replicas)

    def _add_masks(self, number: Any, lane: Any, *vectors: Any) -> list[Any]:
        return self._masks.add_to(int(number), int(lane), vectors)


@dataclass(frozen=True)
class Message:
    """What a replica sends in a secure sum.

    Attributes:
        vectors: Two vectors of masked whole numbers: updates, and all else.
        of_updates: How updates are rounded to whole numbers.
        updates: The tensors that the first vector has.
        others: The tensors that the second vector has, before two counts.
        replicas: The number of replicas.
    """

    vectors: list[Tensor]
    of_updates: FixedPoint
    updates: list[Tensor]
    others: list[Tensor]
    replicas: int

    def read(self, sums: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Returns the sums of the tensors.

        Args:
            sums: The sum of the messages of all replicas.

        Returns:
            The sums of the updates, float64; of the others, in their types; and the part of
            values that were clipped, on any replica.
        """
        updates, exact = sums
        check = tf.debugging.Assert(
            tf.equal(exact[-1], self.replicas), [NOT_CANCELLED, exact[-1], self.replicas]
        )
        with tf.control_dependencies([] if check is None else [check]):
            updates, exact = tf.identity(updates), tf.identity(exact)
        others, begin = [], 0
        for other in self.others:
            size = _size(other)
            rows = STATE.words + 1 if other.dtype.is_floating else 1
            part = tf.reshape(exact[begin : begin + rows * size], [rows, size])
            value = STATE.decode(part) if other.dtype.is_floating else part
            others.append(tf.reshape(tf.cast(value, other.dtype), other.shape))
            begin += rows * size
        values = self.replicas * sum(_size(t) for t in (*self.updates, *self.others))
        clipped = tf.cast(exact[-2] / values, tf.float32)
        return _split(self.of_updates.decode(updates), self.updates), others, clipped


def _size(tensor: Tensor) -> int:
    return math.prod(tensor.shape)


def _flat(tensors: Sequence[Tensor], dtype: Any) -> Tensor:
    flat = [tf.reshape(tf.cast(tensor, dtype), [-1]) for tensor in tensors]
    return tf.concat(flat, 0) if flat else tf.zeros([0], dtype)


def _split(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    if not like:
        return []
    parts = tf.split(flat, [_size(tensor) for tensor in like])
    return [tf.reshape(part, t.shape) for part, t in zip(parts, like, strict=True)]
