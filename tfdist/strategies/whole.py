"""Every process computes the whole batch, for steps that are no mean over its rows."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from tfdist.cluster import Cluster
from tfdist.strategies.base import Place, Strategy, Tensor


class Whole(Strategy):
    """Trains each process on the whole batch. After a step, all take the chief's state.

    The result is that of one process, whatever the step computes. It is not faster.

    Args:
        strategy: The strategy that connects the processes.
    """

    def __init__(self, strategy: Strategy) -> None:
        self.connected = strategy
        self.place = Place()

    @classmethod
    def unavailable(cls, cluster: Cluster) -> str | None:
        """Returns None: this strategy can always run."""
        return None

    @property
    def has_company(self) -> bool:
        """Whether other processes compute the same batches."""
        return self.connected.place.num_workers > 1

    def explaining_losses(self) -> contextlib.AbstractContextManager[None]:
        """Explains the loss of a process, as the connecting strategy does."""
        return self.connected.explaining_losses()

    def waiting_for(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Limits a wait for the other workers."""
        return self.connected.waiting_for(what)

    def sums(self, values: Tensor) -> Tensor:
        """Sums a tensor of every worker.

        Args:
            values: A tensor of the same shape and dtype on every worker.
        """
        return self._summed([values], is_chiefs=False)[0]

    def take_chiefs(self, variables: Sequence[Any]) -> None:
        """Assigns the chief's values to variables, on every worker.

        Args:
            variables: `keras.Variable`s, in the same order on every worker.
        """
        # A sum to which only the chief contributes is a broadcast, which not every strategy
        # has.
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
            def on_replica() -> list[Tensor]:
                # Horovod's replica id is a Python number. Adding a tensor keeps TensorFlow
                # from folding the sums below into constants, which it would do only once.
                replica = strategy.replica_id() + zero
                contributes = tf.equal(replica if is_chiefs else replica % copies, 0)
                return strategy.all_reduce_sum(
                    [
                        tf.where(contributes, _summable(t), tf.zeros_like(_summable(t)))
                        for t in tensors
                    ]
                )

            reduced = strategy.run(on_replica)
            return [tf.cast(r, t.dtype) for r, t in zip(reduced, tensors, strict=True)]

        return tf.function(summed, autograph=False)  # type: ignore[no-any-return]


def _summable(tensor: Tensor) -> Tensor:
    # Collectives do not add these types. The bits of a uint32 survive the way to int32 and
    # back.
    return tf.cast(tensor, tf.int32) if tensor.dtype in (tf.bool, tf.uint32) else tensor


def as_whole(strategy: Strategy) -> Whole | None:
    """Gives a strategy if it computes whole batches, else None.

    Args:
        strategy: Any.
    """
    return strategy if isinstance(strategy, Whole) else None


@functools.cache
def whole(strategy: Strategy) -> Whole:
    """Returns the `Whole` of a strategy's processes, always the same one.

    Args:
        strategy: The strategy that connects the processes.
    """
    return Whole(strategy)
