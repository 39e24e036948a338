"""Replacements in Keras while an optimizer's variables, and maybe weights, are in parts.

================================  ======================================================
place                             what changes
================================  ======================================================
the optimizer's update            it updates this replica's part of each weight, and the
                                  parts are gathered; or, where the elements of a variable
                                  depend on each other, its state is gathered for the update
clipping by norm                  the squares of all parts are summed over replicas
the check of loss scaling         a replica's gradients are not finite if another's are not
the average of weights (EMA)      is of this replica's parts; it is gathered to overwrite them
saving an optimizer               reads whole variables
loading an optimizer              is refused
weight decay                      of a weight in parts, it is of this replica's part
`GradientTape`                    the gradient of a weight in parts; see `sharded_tapes`
================================  ======================================================

All else that Keras does in `apply` (constraints, the count) it does with whole weights on every
replica, as without parts.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.tensorflow.core import Variable as _Variable
from keras.src.backend.tensorflow.optimizer import TFOptimizer as _TFOptimizer
from keras.src.optimizers.base_optimizer import BaseOptimizer as _BaseOptimizer

from tfdist._keras.interception import Replacement, replaced
from tfdist._keras.optimizers import with_nested
from tfdist._keras.parts import FixedValue
from tfdist._keras.replica import Tensor, current_batch
from tfdist._keras.served_updates import is_elementwise, trained_by
from tfdist._keras.sharded_tapes import replacements as _of_tapes
from tfdist._keras.sharded_updates import (
    AVERAGES,
    Sharding,
    clip_by_norms,
    overwrite_by_parts,
    own_gradient,
    own_part,
    update_parts,
    update_whole,
)
from tfdist._keras.sharded_weights import showing_parts
from tfdist.errors import StrategyError

_ACCUMULATORS = "_accumulated_gradients"


def slots_in_parts(optimizer: Any) -> list[tuple[Any, list[Any]]]:
    """Lists the weights that an optimizer trains, each with the state that can be in parts.

    Args:
        optimizer: A built `keras.Optimizer` that wraps no other.

    Returns:
        Pairs of a weight and those of the optimizer's variables that have its shape.
    """
    whole = set()
    if not is_elementwise(optimizer):  # its gradients are whole, and so are their sums
        whole = {id(v) for v in getattr(optimizer, _ACCUMULATORS, ())}
    return [
        (
            weight,
            [s for s in slots if tuple(s.shape) == tuple(weight.shape) and id(s) not in whole],
        )
        for weight, slots in trained_by(optimizer)
        if not getattr(weight, "overwrite_with_gradient", False)
    ]


@contextlib.contextmanager
def updating_parts(sharding: Sharding) -> Iterator[None]:
    """Replaces the places named at the top of this file.

    Args:
        sharding: The parts.
    """
    with contextlib.ExitStack() as stack:
        for owner, name, value in replacements(sharding):
            stack.enter_context(replaced(owner, name, value))
        yield


def replacements(sharding: Sharding) -> list[Replacement]:
    """Lists the replacements; see `updating_parts`."""
    return [
        *_of_updates(sharding),
        *_of_averages(sharding),
        *_of_reading(sharding),
        *_of_tapes(),
    ]


def _of_updates(sharding: Sharding) -> list[Replacement]:
    """Lists the replacements for the update of weights."""
    applying = threading.local()  # the weights that this thread's optimizer updates
    update = _TFOptimizer._backend_update_step
    apply_gradients = _BaseOptimizer._backend_apply_gradients
    decay = _TFOptimizer._apply_weight_decay

    def update_step(optimizer: Any, grads: Any, variables: Any, learning_rate: Any) -> None:
        if not sharding.has_parts(optimizer):
            update(optimizer, grads, variables, learning_rate)
        elif is_elementwise(optimizer):
            update_parts(sharding, optimizer, grads, variables, learning_rate)
        else:
            update_whole(sharding, optimizer, grads, variables, learning_rate)

    def backend_apply_gradients(optimizer: Any, grads: Any, variables: Any) -> None:
        if sharding.has_parts(optimizer) and current_batch() is None:
            # A single update would wait forever for the parts of the other replicas.
            raise StrategyError(
                "While the optimizer's state is in parts, only the steps of `fit` may update "
                f"weights. Received: an update by {optimizer.name!r} outside of them, such as "
                "train_on_batch or fit in a callback. Do it after `fit`, or leave `Zero` out."
            )
        before = getattr(applying, "weights", None)
        # `clip_gradients` gets gradients only, and must know which of them are parts.
        applying.weights = list(variables)
        shown: list[Any] = []
        # Before Keras clips and accumulates gradients, so that it does so with parts.
        if _updates_parts(sharding, optimizer):
            grads = [
                own_gradient(sharding, g, v) for g, v in zip(grads, variables, strict=True)
            ]
            shown = [*variables, *optimizer._trainable_variables]
        try:
            with showing_parts(shown):
                apply_gradients(optimizer, grads, variables)
        finally:
            applying.weights = before

    def apply_weight_decay(optimizer: Any, variables: Any) -> None:
        with showing_parts(variables):
            decay(optimizer, variables)

    return [
        (_TFOptimizer, "_backend_update_step", update_step),
        (_BaseOptimizer, "_backend_apply_gradients", backend_apply_gradients),
        (_TFOptimizer, "_apply_weight_decay", apply_weight_decay),
        *_of_gradients(sharding, applying),
    ]


def _updates_parts(sharding: Sharding, optimizer: Any) -> bool:
    return sharding.has_parts(optimizer) and is_elementwise(optimizer)


def _of_gradients(sharding: Sharding, applying: threading.local) -> list[Replacement]:
    """Lists the replacements for what Keras computes of all gradients together.

    Args:
        sharding: The parts.
        applying: Its `weights` are those that this thread's optimizer updates.
    """
    clip = _BaseOptimizer._clip_gradients
    check_finite = keras.optimizers.LossScaleOptimizer.check_finite

    def clip_gradients(optimizer: Any, grads: Any) -> Any:
        has_norm = optimizer.clipnorm or optimizer.global_clipnorm
        if not has_norm or not _updates_parts(sharding, optimizer):
            return clip(optimizer, grads)
        return clip_by_norms(sharding, optimizer, grads, applying.weights)

    def is_finite(optimizer: Any, grads: Any) -> Tensor:
        # All replicas must skip the same steps, also if only one part of a gradient overflows.
        finite = check_finite(optimizer, grads)
        has_parts = any(map(sharding.has_parts, with_nested([optimizer])))
        if current_batch() is None or not has_parts:
            return finite
        return sharding.sum(tf.cast(tf.logical_not(finite), tf.float32)[None])[0] == 0.0

    return [
        (_BaseOptimizer, "_clip_gradients", clip_gradients),
        (keras.optimizers.LossScaleOptimizer, "check_finite", is_finite),
    ]


def _of_averages(sharding: Sharding) -> list[Replacement]:
    """Lists the replacements for the moving averages of weights."""
    average = _BaseOptimizer._update_model_variables_moving_average
    overwrite = _TFOptimizer._overwrite_model_variables_with_average_value

    def update_average(optimizer: Any, variables: Any) -> None:
        with showing_parts(variables):
            if sharding.has_parts(optimizer):
                averages = getattr(optimizer, AVERAGES, None) or [None] * len(variables)
                cuts = [None if a is None else sharding.cut_of(a) for a in averages]
                variables = [
                    v if cut is None else FixedValue(own_part(sharding, v, cut))
                    for v, cut in zip(variables, cuts, strict=True)
                ]
            average(optimizer, variables)

    def overwrite_weights(optimizer: Any, variables: Any) -> None:
        if not sharding.has_parts(optimizer):
            overwrite(optimizer, variables)
        elif current_batch() is None:  # at the end of training, outside of the replicas
            for variable, mean in zip(variables, getattr(optimizer, AVERAGES), strict=True):
                if mean is not None:
                    is_cut = sharding.cut_of(mean) is not None
                    variable.assign(sharding.join(mean) if is_cut else mean)
        else:
            with showing_parts(variables):
                overwrite_by_parts(sharding, optimizer, variables)

    return [
        (_BaseOptimizer, "_update_model_variables_moving_average", update_average),
        (_TFOptimizer, "_overwrite_model_variables_with_average_value", overwrite_weights),
    ]


def _of_reading(sharding: Sharding) -> list[Replacement]:
    """Lists the replacements for saving and loading an optimizer."""
    save, load = _BaseOptimizer.save_own_variables, _BaseOptimizer.load_own_variables
    serialize = _Variable._serialize_to_tensors

    def save_own_variables(optimizer: Any, store: Any) -> None:
        if not any(map(sharding.has_parts, with_nested([optimizer]))):
            save(optimizer, store)
            return
        for number, variable in enumerate(optimizer.variables):
            store[str(number)] = sharding.read(variable)

    def load_own_variables(optimizer: Any, store: Any) -> None:
        for variable in optimizer.variables:
            cut = sharding.cut_of(variable)
            if cut is not None and tuple(variable.shape) != cut.shape:
                raise StrategyError(
                    "An optimizer can be loaded only while its state is whole. Received: a "
                    f"callback that loads {optimizer.name!r}, whose state `Zero` has in parts "
                    "while training. Load it before `fit`, or leave `Zero` out."
                )
        load(optimizer, store)

    def serialize_to_tensors(variable: Any) -> Any:
        # `tf.train.Checkpoint` asks each variable by itself, and must get whole ones.
        cut = sharding.cut_of(variable)
        if cut is None or tuple(variable.shape) == cut.shape:
            return serialize(variable)
        return {"VARIABLE_VALUE": tf.constant(sharding.read(variable))}

    return [
        (_BaseOptimizer, "save_own_variables", save_own_variables),
        (_BaseOptimizer, "load_own_variables", load_own_variables),
        (_Variable, "_serialize_to_tensors", serialize_to_tensors),
    ]
