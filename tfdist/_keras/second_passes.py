"""What a second pass of a call needs: what surrounded the first one, and later values."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from keras.src.backend.common import global_state as _global_state
from tensorflow.python.ops import control_flow_util as _control_flow

from tfdist._keras.replica import current_batch, on_replica

Tensor = Any


@dataclass(frozen=True)
class CallSurroundings:
    """What a call depends on besides its arguments and variables."""

    autocast: Any
    context: Any
    batch: Any
    python_random: Any
    numpy_random: Any

    @classmethod
    def now(cls) -> CallSurroundings:
        """Returns those of the running call."""
        return cls(
            _global_state.get_global_attribute("autocast_scope"),
            copy.copy(_global_state.get_global_attribute("current_call_ctx")),
            current_batch(),
            random.getstate(),
            np.random.get_state(),
        )

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Restores them while the context lasts."""
        before = self.now()
        try:
            self._set()
            with on_replica(self.batch):
                yield
        finally:
            before._set()

    def _set(self) -> None:
        _global_state.set_global_attribute("autocast_scope", self.autocast)
        # A copy, as each layer leaves its `training` in it.
        _global_state.set_global_attribute("current_call_ctx", copy.copy(self.context))
        random.setstate(self.python_random)
        np.random.set_state(self.numpy_random)


def after(
    upstream: Sequence[Tensor], tensors: Sequence[Tensor], values: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the same tensors, available when the gradients of the layer's results are.

    Otherwise the second pass could run at any time, and its activations would be kept, or
    be found to be those of the first pass.

    Args:
        upstream: The gradients.
        tensors: The layer's arguments.
        values: The values of variables.
    """
    if not _control_flow.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()):
        with tf.control_dependencies(upstream):
            return [tf.identity(t) for t in tensors], [tf.identity(v) for v in values]
    # XLA ignores control dependencies. So, as in `tf.recompute_grad`, a zero is added that XLA
    # cannot know to be one. A barrier for XLA does not keep the passes apart on a CPU.
    first = tf.reshape(upstream[0], [-1])[:1]
    is_any = tf.cast(tf.reduce_max(tf.math.real(first)), tf.bool)
    zero = tf.where(tf.equal(is_any, is_any), 0.0, float("nan"))

    def later(tensors_now: Sequence[Tensor]) -> list[Tensor]:
        return [t + tf.cast(zero, t.dtype) if has_gradient(t) else t for t in tensors_now]

    if any(map(has_gradient, tensors)):
        return later(tensors), list(values)
    return list(tensors), later(values)


def has_gradient(value: Any) -> bool:
    """Tells whether a value is a tensor of the graph that can have a gradient."""
    is_tensor = tf.is_symbolic_tensor(value)
    return bool(is_tensor and (value.dtype.is_floating or value.dtype.is_complex))


def tied(
    results: Sequence[Tensor], anchors: Sequence[Tensor], gradient: Callable[..., list[Any]]
) -> list[Tensor]:
    """Returns results with a gradient of their own, as functions of the anchors.

    Args:
        results: The results of a first pass. Those without a gradient are returned as they are.
        anchors: The tensors by which the results are differentiated.
        gradient: Takes the gradients of the results that have one, and returns those of the
            anchors.
    """
    numbers = [i for i, result in enumerate(results) if has_gradient(result)]

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def computed(*_: Tensor) -> tuple[list[Tensor], Callable[..., list[Any]]]:
        return [results[i] for i in numbers], gradient

    with_gradient = list(results)
    for i, result in zip(numbers, computed(*anchors), strict=True):
        mask = getattr(results[i], "_keras_mask", None)
        if mask is not None:
            result._keras_mask = mask
        with_gradient[i] = result
    return with_gradient
