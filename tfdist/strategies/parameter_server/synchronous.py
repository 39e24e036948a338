"""Synchronous training with parameter servers: collectives of workers, computed on servers.

TensorFlow runs a mirrored step on the workers' devices. A merge call is where all replicas of
the step meet: here tensors of all workers are added on a server, and variables are updated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from tfdist.strategies.base import Tensor
from tfdist.strategies.mirrored_variables import MirroredVariables
from tfdist.strategies.parameter_server.server_variables import ServerVariables
from tfdist.strategies.tf_distribute import MirroredStrategy


def mirrored_strategy(devices: Sequence[str]) -> Any:
    """Makes a `tf.distribute.MirroredStrategy` over devices of several processes.

    Args:
        devices: A device of each worker.
    """
    # TensorFlow refuses devices of several processes, but not while a graph is built. The
    # strategy is needed only to trace a function once for each device, in step.
    with tf.Graph().as_default():
        return MirroredStrategy(
            list(devices), cross_device_ops=tf.distribute.ReductionToOneDevice()
        )


def sum_on_devices(tensors: Sequence[Tensor], devices: Sequence[str]) -> list[Tensor]:
    """Sums each tensor over all replicas, on a device.

    Args:
        tensors: This replica's dense tensors, or `tf.IndexedSlices`.
        devices: The device of each sum.
    """
    if not tensors:
        return []

    def merge(strategy: Any, merged: Any) -> list[Tensor]:
        sums = []
        for tensor, device in zip(merged, devices, strict=True):
            addends = strategy.experimental_local_results(tensor)
            with tf.device(device):
                sums.append(_sum(addends))
        return sums

    context = tf.distribute.get_replica_context()
    result: list[Tensor] = context.merge_call(merge, args=(list(tensors),))
    return result


def differentiable_sum(tensors: Sequence[Tensor], device: str) -> list[Tensor]:
    """Sums each tensor over all replicas, on one device. Its gradient is the same sum.

    Args:
        tensors: This replica's dense tensors, or `tf.IndexedSlices`.
        device: The device of all sums.
    """

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def dense_sum(*dense: Tensor) -> tuple[list[Tensor], Callable[..., list[Tensor]]]:
        devices = [device] * len(dense)
        return sum_on_devices(dense, devices), lambda *dys: sum_on_devices(dys, devices)

    # A custom gradient takes dense tensors only. No layer reduces slices, so their sum needs
    # no gradient.
    are_slices = [isinstance(tensor, tf.IndexedSlices) for tensor in tensors]
    slices = [t for t, is_slices in zip(tensors, are_slices, strict=True) if is_slices]
    dense = [t for t, is_slices in zip(tensors, are_slices, strict=True) if not is_slices]
    slice_sums = iter(sum_on_devices(slices, [device] * len(slices)))
    dense_sums = iter(dense_sum(*dense) if dense else ())
    return [next(slice_sums if is_slices else dense_sums) for is_slices in are_slices]


def concatenate_on_device(tensor: Tensor, device: str) -> Tensor:
    """Concatenates a tensor of every replica along axis 0, on a device.

    Args:
        tensor: This replica's tensor, shape [rows, ...].
        device: The device of the result.
    """

    def merge(strategy: Any, merged: Any) -> Tensor:
        with tf.device(device):
            return tf.concat(strategy.experimental_local_results(merged), 0)

    return tf.distribute.get_replica_context().merge_call(merge, args=(tensor,))


def update_once(action: Callable[[], None], device: str) -> None:
    """Runs an update once for all replicas, on a device.

    Args:
        action: Assigns variables.
        device: The device of its operations.
    """

    def merge(strategy: Any) -> None:
        with tf.device(device):
            action()

    tf.distribute.get_replica_context().merge_call(merge)


class SynchronousVariables(contextlib.AbstractContextManager[None]):
    """Puts some variables on servers, and a copy of all others on each worker.

    Args:
        mirrored: Moves the copies to the workers, or None if there are none.
        on_servers: Moves the other variables to the servers.
    """

    def __init__(self, mirrored: MirroredVariables | None, on_servers: ServerVariables) -> None:
        self._contexts = [each for each in (mirrored, on_servers) if each is not None]

    def __enter__(self) -> None:
        for context in self._contexts:
            context.__enter__()

    def __exit__(self, *error: object) -> None:
        for context in reversed(self._contexts):
            context.__exit__(*error)


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    if isinstance(tensors[0], tf.IndexedSlices):
        return tf.IndexedSlices(
            tf.concat([tensor.values for tensor in tensors], 0),
            tf.concat([tensor.indices for tensor in tensors], 0),
            tensors[0].dense_shape,
        )
    return tf.add_n(list(tensors))
