"""The input of a federated training: each element is what one replica does in a round."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfdist.data.arrays import Arrays
from tfdist.data.epochs import START, DataPosition
from tfdist.data.leaves import gather, spec, with_num_rows
from tfdist.data.source import FOREVER, Source, without_autograph, without_tuning
from tfdist.federated.plan import OfReplica, RoundPlan
from tfdist.strategies.base import Place

Tensor = Any
_SPECS = OfReplica(
    rows=tf.TensorSpec([None, None], tf.int64),
    counts=tf.TensorSpec([None], tf.int64),
    clients=tf.TensorSpec([None], tf.int64),
    steps=tf.TensorSpec([None], tf.int64),
    weights=tf.TensorSpec([None], tf.float64),
    slots=tf.TensorSpec([None], tf.int64),
    streams=tf.TensorSpec([None], tf.int64),
    held=tf.TensorSpec([2], tf.int64),
    longest=tf.TensorSpec([], tf.int64),
    number=tf.TensorSpec([], tf.int64),
    check=tf.TensorSpec([4], tf.float32),
)


class Batch(NamedTuple):
    """The batch of one local step.

    Attributes:
        data: The input of Keras's steps: `x`, `(x, y)` or `(x, y, sample_weight)`.
        rows: Scalar int64, number of rows. If it is 0, `data` has one row of padding.
    """

    data: Any
    rows: Tensor


class Rounds(Source):
    """Rounds over arrays. A pass is a round, which is one step of Keras's loop.

    Args:
        arrays: The rows of this process.
        plan: The plan of rounds.
    """

    batches = 1
    spans_passes = True

    def __init__(self, arrays: Arrays, plan: RoundPlan) -> None:
        self._arrays = arrays
        self.plan = plan

    def shares(self, place: Place, position: DataPosition = START) -> Any:
        """Builds the stream of what the local replicas do, round by round."""

        def of_replica(number: np.int64) -> list[Any]:
            made, local = divmod(int(number), place.local_replicas)
            return list(self.plan.of_replica(first + made, place.first_replica + local))

        @without_autograph
        def element(number: Tensor) -> OfReplica:
            parts = tf.numpy_function(of_replica, [number], [spec.dtype for spec in _SPECS])
            pairs = zip(parts, _SPECS, strict=True)
            return OfReplica(*(tf.ensure_shape(part, spec.shape) for part, spec in pairs))

        first = position.number + position.num_drawn
        return without_tuning(tf.data.Dataset.range(FOREVER).map(element, 1).prefetch(2))

    def batch_of(self, share: OfReplica) -> Callable[[Tensor], Batch]:
        """Makes a function that gathers the rows of a local step.

        Args:
            share: What a replica does in a round.

        Returns:
            A function of the step's number, a scalar int64.
        """

        def batch(step: Tensor) -> Batch:
            count = share.counts[step]
            # A batch without rows has one of padding, which does not count.
            size = tf.maximum(count, 1) if self.plan.may_be_empty else count
            # The arrays are in the memory of the host; only a batch goes to the device.
            with tf.device("CPU:0"):
                rows = with_num_rows(share.rows[step, :size], self.plan.full_batch)
                data = tf.nest.map_structure(lambda c: gather(c, rows), self._arrays.data)
            return Batch(data, count)

        return batch

    def position_after(self, steps: int) -> DataPosition:
        """Returns the round at which a new `fit` begins, from the local steps so far."""
        return DataPosition(number=-(-steps // max(1, self.plan.longest)))

    def spec(self) -> Any:
        """Returns the shapes and dtypes of a local batch."""
        rows = self.plan.full_batch
        return tf.nest.map_structure(lambda column: spec(column, rows), self._arrays.data)

    def sample(self, rows: int = 8) -> Any:
        """Returns rows of this process, or random ones if it has none."""
        return self._arrays.sample(rows)

    def spec_text(self) -> str:
        """Returns the shapes and dtypes of a local batch without its size, as text."""
        return self._arrays.spec_text()

    def fingerprint(self) -> str:
        """Returns a text that differs if the rows, the clients or the plan differ."""
        clients = self.plan.clients
        digest = hashlib.sha256(clients.sizes.tobytes() + clients.workers.tobytes())
        digest.update(self.plan.round(0).check.tobytes())
        return f"{self._arrays.fingerprint()}, clients {digest.hexdigest()[:12]}"

    @property
    def common_data(self) -> Any:
        """The arrays, if every worker has them."""
        return self._arrays.common_data

    @property
    def drawn_from(self) -> Source:
        """The arrays."""
        return self._arrays
