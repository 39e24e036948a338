"""Every replica computes the whole batch: for steps whose outcome is no mean over its rows."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from tfdist.cluster import Cluster
from tfdist.strategies.base import Place, Strategy, Tensor


class Whole(Strategy):
    """Trains in each process as one process would; all take the chief's state after a step.

    That is what one process computes, whatever a step does, and it is no faster.

    Args:
        strategy: What connects the processes.
    """

    def __init__(self, strategy: Strategy) -> None:
        self.connected = strategy
        self.place = Place()

    @classmethod
    def unavailable(cls, cluster: Cluster) -> str | None:
        """Says why not: it always can."""
        return None

    @property
    def has_company(self) -> bool:
        """Whether there are other processes that compute the same."""
        return self.connected.place.num_workers > 1

    def explaining_losses(self) -> contextlib.AbstractContextManager[None]:
        """Says what a lost process means, as what connects them does."""
        return self.connected.explaining_losses()

    def waiting_for(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Limits a wait for the other workers."""
        return self.connected.waiting_for(what)

    def sums(self, values: Tensor) -> Tensor:
        """Sums a float tensor of every worker.

        Args:
            values: Of the same shape on every worker.
        """
        return self._summed([values], is_chiefs=False)[0]

    def take_chiefs(self, variables: Sequence[Any]) -> None:
        """Gives variables the chief's values, on every worker.

        Args:
            variables: `keras.Variable`s, in the same order on every worker.
        """
        values = self._summed([tf.convert_to_tensor(v) for v in variables], is_chiefs=True)
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)

    def _summed(self, tensors: list[Tensor], is_chiefs: bool) -> list[Tensor]:
        summed: list[Tensor] = self._all_reduce(tensors, is_chiefs, tf.constant(0))
        return summed

    @functools.cached_property
    def _all_reduce(self) -> Callable[[list[Tensor], bool, Tensor], list[Tensor]]:
        strategy = self.connected
        copies = strategy.place.local_replicas

        def summed(tensors: list[Tensor], is_chiefs: bool, zero: Tensor) -> list[Tensor]:
            def one() -> list[Tensor]:
                # Of what is known when it is traced, TensorFlow makes constants; also of
                # Horovod's sums, which then are made once.
                replica = strategy.replica_id() + zero
                counts = tf.equal(replica if is_chiefs else replica % copies, 0)
                return strategy.all_reduce_sum(
                    [
                        tf.where(counts, _summable(t), tf.zeros_like(_summable(t)))
                        for t in tensors
                    ]
                )

            reduced = strategy.run(one)
            return [tf.cast(r, t.dtype) for r, t in zip(reduced, tensors, strict=True)]

        return tf.function(summed, autograph=False)  # type: ignore[no-any-return]


def _summable(tensor: Tensor) -> Tensor:
    return tf.cast(tensor, tf.int32) if tensor.dtype in (tf.bool, tf.uint32) else tensor


@functools.cache
def whole(strategy: Strategy) -> Whole:
    """Gives what computes whole batches in a strategy's processes.

    Args:
        strategy: What connects the processes.
    """
    return Whole(strategy)
