"""What a private update is made of, besides the noisy gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from tfdist import _keras
from tfdist._keras import ReplicaBatch
from tfdist.errors import ArgumentError

Tensor = Any


@contextlib.contextmanager
def without_metrics(model: Any, batch: ReplicaBatch) -> Iterator[None]:
    """Makes a context in which metrics must not be read, since they have no noise.

    Args:
        model: A compiled, built `keras.Model`.
        batch: The description of the replica's batch.

    Raises:
        ArgumentError: The context has read one.
    """
    with batch.noting_reads() as reads:
        yield
    for variable in _keras.metric_variables(model):
        if id(variable) in reads:
            raise ArgumentError(
                "The update must depend on the examples by the noisy gradient alone: the "
                "optimizer, its learning rate's schedule and regularizers must not read a "
                f"loss or metric, which has no noise. Received: {variable.path!r}, which is "
                "read. Leave it out."
            )


def penalties(variables: Any) -> list[Tensor | None]:
    """Returns the gradients of the variables' regularizers.

    Args:
        variables: `keras.Variable`s.
    """
    gradients: list[Tensor | None] = []
    for variable in variables:
        if variable.regularizer is None:
            gradients.append(None)
            continue
        value = tf.cast(tf.convert_to_tensor(variable), tf.float32)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(value)
            penalty = variable.regularizer(value)
        gradients.append(tape.gradient(penalty, value))
    return gradients
