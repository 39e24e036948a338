"""Handles models and calls in a `tf.distribute` scope that the user's script has opened."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.python.distribute import distribute_lib as _distribute

from tfdist._keras.building import layers_of
from tfdist._keras.optimizers import reindex_optimizer, swap_strategy
from tfdist._keras.variables import swap_value


@contextlib.contextmanager
def outside_scopes() -> Iterator[None]:
    """Makes a context outside of all strategies' scopes, even if the caller is in one."""
    if not tf.distribute.has_strategy():
        yield
        return
    # A scope does two things: it sets the strategy of the thread, and a stack of creators in
    # the graph makes each new `tf.Variable` a distributed one. Both are undone here.
    graph = tf.compat.v1.get_default_graph()
    creators = graph._variable_creator_stack
    _distribute._push_per_thread_mode(_distribute._get_default_replica_mode())
    graph._variable_creator_stack = ()
    try:
        yield
    finally:
        graph._variable_creator_stack = creators
        _distribute._pop_per_thread_mode()


def scope_of(model: Any) -> Any:
    """Returns the strategy in whose scope a model was made, or None.

    Args:
        model: A `keras.Model`.
    """
    return getattr(model, "_distribute_strategy", None)


def leave_scope(model: Any, variables: Sequence[Any], optimizers: Sequence[Any]) -> None:
    """Converts a model that was made in a scope into a model without one.

    Args:
        model: A `keras.Model`.
        variables: Its `keras.Variable`s, with those of its optimizers and metrics.
        optimizers: Its optimizers, with those that they wrap.
    """
    for layer in layers_of(model):
        if scope_of(layer) is not None:
            layer._distribute_strategy = None
    for variable in variables:
        # In a scope, variables are mirrored already. `hold` expects plain ones, which it moves
        # itself.
        value = variable._value
        if isinstance(value, tf.distribute.DistributedValues):
            local = value.distribute_strategy.experimental_local_results(value)[0]
            plain = tf.Variable(
                tf.identity(local),
                trainable=variable.trainable,
                dtype=variable.dtype,
                name=variable.name,
            )
            swap_value(variable, plain)
    for optimizer in optimizers:
        # An optimizer assigns through the strategy in whose scope it was made.
        swap_strategy(optimizer, _distribute._get_default_strategy())
        reindex_optimizer(optimizer)


def undistributed(dataset: Any) -> Any:
    """Returns the original of a distributed dataset. Any other value is returned as it is.

    Args:
        dataset: A `tf.distribute.DistributedDataset`, or any other value.
    """
    if isinstance(dataset, tf.distribute.DistributedDataset):
        return getattr(dataset, "_original_dataset", dataset)
    return dataset


def layout_map_of(distribution: Any) -> Any:
    """Returns the layout map of a distribution of Keras's, which has no name for it.

    Args:
        distribution: A `keras.distribution.ModelParallel`.
    """
    return distribution._layout_map
