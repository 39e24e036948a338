"""Replacements in Keras while an optimizer's variables are in parts.

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
================================  ======================================================

All else that Keras does in `apply` (weight decay, constraints, the count) it does with whole
weights on every replica, as without parts.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import keras
import tensorflow as tf
from keras.src.backend.tensorflow.core import Variable as _Variable
from keras.src.backend.tensorflow.optimizer import TFOptimizer as _TFOptimizer
from keras.src.optimizers.base_optimizer import BaseOptimizer as _BaseOptimizer

from tfdist._keras.interception import Replacement
from tfdist._keras.optimizers import with_nested
from tfdist._keras.parts import FixedValue
from tfdist._keras.replica import Tensor, current_batch
from tfdist._keras.served_updates import is_elementwise, trained_by

_AVERAGES = "_model_variables_moving_average"
_ACCUMULATORS = "_accumulated_gradients"


class Sharding(Protocol):
    """The parts of one model, for the replacements in Keras's optimizers."""

    def has_parts(self, optimizer: Any) -> bool:
        """Tells whether some of an optimizer's variables are in parts."""

    def cut_of(self, variable: Any) -> Any:
        """Returns the cut of a weight or of an optimizer's variable in parts, or None."""

    def replica_id(self) -> Tensor:
        """Returns the number of this replica's parts."""

    def packs(self, variables: Sequence[Any]) -> list[list[int]]:
        """Groups variables into packs, whose parts are gathered together."""

    def gather(self, cuts: Sequence[Any], parts: Sequence[Tensor]) -> list[Tensor]:
        """Gathers whole tensors from the parts of all replicas."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Sums a small tensor over all replicas."""

    def join(self, variable: Any) -> Any:
        """Returns the whole value of an optimizer's variable. All processes must call it."""

    def read(self, variable: Any) -> Any:
        """Returns the whole value of an optimizer's variable as an array."""


class Part:
    """A tensor that an optimizer updates as if it were a variable.

    Args:
        value: The tensor.
        unique_id: By which the optimizer finds its state for the variable.

    Attributes:
        tensor: The current value.
    """

    def __init__(self, value: Tensor, unique_id: str = "") -> None:
        self.tensor = value
        self.dtype = value.dtype
        self.shape = value.shape
        self._unique_id = unique_id

    def __tf_tensor__(self, dtype: Any = None, name: str | None = None) -> Tensor:
        return tf.cast(self.tensor, dtype or self.dtype)

    def assign(self, value: Tensor) -> None:
        """Replaces the value."""
        self.tensor = tf.ensure_shape(tf.cast(value, self.dtype), self.shape)

    def assign_add(self, value: Tensor) -> None:
        """Adds to the value."""
        self.assign(self.tensor + tf.cast(value, self.dtype))

    def assign_sub(self, value: Tensor) -> None:
        """Subtracts from the value."""
        self.assign(self.tensor - tf.cast(value, self.dtype))

    def scatter_update(self, rows: Tensor) -> None:
        """Replaces rows."""
        self._scatter(tf.tensor_scatter_nd_update, rows)

    def scatter_add(self, rows: Tensor) -> None:
        """Adds to rows."""
        self._scatter(tf.tensor_scatter_nd_add, rows)

    def scatter_sub(self, rows: Tensor) -> None:
        """Subtracts from rows."""
        self._scatter(tf.tensor_scatter_nd_sub, rows)

    def _scatter(self, scatter: Any, rows: Tensor) -> None:
        self.assign(scatter(self.tensor, rows.indices[:, None], rows.values))


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
        for owner, name, value in _replacements(sharding):
            before = vars(owner).get(name)
            setattr(owner, name, value)
            stack.callback(_restore, owner, name, before)
        yield


def _restore(owner: Any, name: str, before: Any) -> None:
    if before is None:
        delattr(owner, name)
    else:
        setattr(owner, name, before)


def _replacements(sharding: Sharding) -> list[Replacement]:
    """Lists the replacements; see `updating_parts`."""
    applying = threading.local()  # the weights that this thread's optimizer updates

    def of(owner: Any, name: str) -> Any:
        return getattr(owner, name)

    update = of(_TFOptimizer, "_backend_update_step")
    apply_gradients = of(_BaseOptimizer, "_backend_apply_gradients")
    clip = of(_BaseOptimizer, "_clip_gradients")
    average = of(_BaseOptimizer, "_update_model_variables_moving_average")
    overwrite = of(_TFOptimizer, "_overwrite_model_variables_with_average_value")
    check_finite = of(keras.optimizers.LossScaleOptimizer, "check_finite")
    save = of(_BaseOptimizer, "save_own_variables")
    serialize = of(_Variable, "_serialize_to_tensors")

    def update_step(optimizer: Any, grads: Any, variables: Any, learning_rate: Any) -> None:
        if not sharding.has_parts(optimizer):
            update(optimizer, grads, variables, learning_rate)
        elif is_elementwise(optimizer):
            _update_parts(sharding, optimizer, grads, variables, learning_rate)
        else:
            _update_whole(sharding, optimizer, grads, variables, learning_rate)

    def backend_apply_gradients(optimizer: Any, grads: Any, variables: Any) -> None:
        before = getattr(applying, "weights", None)
        applying.weights = list(variables)
        if sharding.has_parts(optimizer) and is_elementwise(optimizer):
            grads = [
                _own_gradient(sharding, g, v) for g, v in zip(grads, variables, strict=True)
            ]
        try:
            apply_gradients(optimizer, grads, variables)
        finally:
            applying.weights = before

    def clip_gradients(optimizer: Any, grads: Any) -> Any:
        has_norm = optimizer.clipnorm or optimizer.global_clipnorm
        if not has_norm or not sharding.has_parts(optimizer) or not is_elementwise(optimizer):
            return clip(optimizer, grads)
        return _clip_by_norms(sharding, optimizer, grads, applying.weights)

    def update_average(optimizer: Any, variables: Any) -> None:
        if sharding.has_parts(optimizer):
            averages = getattr(optimizer, _AVERAGES, None) or [None] * len(variables)
            cuts = [None if a is None else sharding.cut_of(a) for a in averages]
            variables = [
                v if cut is None else FixedValue(_own(sharding, v, cut))
                for v, cut in zip(variables, cuts, strict=True)
            ]
        average(optimizer, variables)

    def overwrite_weights(optimizer: Any, variables: Any) -> None:
        if not sharding.has_parts(optimizer):
            overwrite(optimizer, variables)
        elif current_batch() is None:  # at the end of training, outside of the replicas
            for variable, mean in zip(variables, getattr(optimizer, _AVERAGES), strict=True):
                if mean is not None:
                    is_cut = sharding.cut_of(mean) is not None
                    variable.assign(sharding.join(mean) if is_cut else mean)
        else:
            _overwrite_by_parts(sharding, optimizer, variables)

    def is_finite(optimizer: Any, grads: Any) -> Tensor:
        finite = check_finite(optimizer, grads)
        has_parts = any(map(sharding.has_parts, with_nested([optimizer])))
        if current_batch() is None or not has_parts:
            return finite
        return sharding.sum(tf.cast(tf.logical_not(finite), tf.float32)[None])[0] == 0.0

    def save_own_variables(optimizer: Any, store: Any) -> None:
        if not sharding.has_parts(optimizer):
            save(optimizer, store)
            return
        for number, variable in enumerate(optimizer.variables):
            store[str(number)] = sharding.read(variable)

    def serialize_to_tensors(variable: Any) -> Any:
        cut = sharding.cut_of(variable)
        if cut is None or tuple(variable.shape) == cut.shape:
            return serialize(variable)
        return {"VARIABLE_VALUE": tf.constant(sharding.read(variable))}

    return [
        (_TFOptimizer, "_backend_update_step", update_step),
        (_BaseOptimizer, "_backend_apply_gradients", backend_apply_gradients),
        (_BaseOptimizer, "_clip_gradients", clip_gradients),
        (_BaseOptimizer, "_update_model_variables_moving_average", update_average),
        (_TFOptimizer, "_overwrite_model_variables_with_average_value", overwrite_weights),
        (keras.optimizers.LossScaleOptimizer, "check_finite", is_finite),
        (_BaseOptimizer, "save_own_variables", save_own_variables),
        (_Variable, "_serialize_to_tensors", serialize_to_tensors),
    ]


def _update_parts(
    sharding: Sharding, optimizer: Any, grads: Any, variables: Any, learning_rate: Any
) -> None:
    """Updates this replica's part of each weight, and gathers the parts."""
    for pack in sharding.packs(variables):
        updated = []
        for i in pack:
            variable = variables[i]
            cut = sharding.cut_of(variable)
            if cut is None:
                optimizer.update_step(grads[i], variable, learning_rate)
                continue
            part = Part(_own(sharding, variable, cut), optimizer._var_key(variable))
            optimizer.update_step(grads[i], part, learning_rate)
            updated.append((variable, cut, part.tensor))
        _assign_gathered(sharding, updated)


def _own_gradient(sharding: Sharding, gradient: Tensor, variable: Any) -> Tensor:
    """Returns this replica's part of a gradient, which may be in parts already."""
    cut = sharding.cut_of(variable)
    if cut is None:
        return gradient
    if isinstance(gradient, tf.IndexedSlices):
        return cut.own_rows(gradient, sharding.replica_id())
    if gradient.shape.is_fully_defined() and tuple(gradient.shape) == cut.part_shape:
        return gradient
    return cut.own(gradient, sharding.replica_id())


def _own(sharding: Sharding, variable: Any, cut: Any) -> Tensor:
    """Returns this replica's part of a weight."""
    return cut.own(tf.convert_to_tensor(variable), sharding.replica_id())


def _assign_gathered(sharding: Sharding, updated: Sequence[tuple[Any, Any, Tensor]]) -> None:
    """Assigns whole weights, from their cuts and this replica's parts."""
    wholes = sharding.gather([cut for _, cut, _ in updated], [part for *_, part in updated])
    for (variable, *_), whole in zip(updated, wholes, strict=True):
        variable.assign(whole)


def _update_whole(
    sharding: Sharding, optimizer: Any, grads: Any, variables: Any, learning_rate: Any
) -> None:
    """Updates whole weights by whole gradients, with state that is gathered for it."""
    slots_of = {id(weight): slots for weight, slots in trained_by(optimizer)}
    averages = {id(v) for v in getattr(optimizer, _AVERAGES, ()) or ()}
    for pack in sharding.packs(variables):
        slots = [
            slot
            for i in pack
            for slot in slots_of[id(variables[i])]
            if sharding.cut_of(slot) is not None and id(slot) not in averages
        ]
        cuts = [sharding.cut_of(slot) for slot in slots]
        parts = [tf.convert_to_tensor(slot) for slot in slots]
        wholes = [Part(whole) for whole in sharding.gather(cuts, parts)]
        with _backed_by(slots, wholes):
            for i in pack:
                optimizer.update_step(grads[i], variables[i], learning_rate)
        for slot, cut, whole in zip(slots, cuts, wholes, strict=True):
            slot.assign(cut.own(whole.tensor, sharding.replica_id()))


@contextlib.contextmanager
def _backed_by(variables: Sequence[Any], values: Sequence[Any]) -> Iterator[None]:
    before = [(v._value, v._shape) for v in variables]
    for variable, value in zip(variables, values, strict=True):
        variable._value, variable._shape = value, tuple(value.shape)
    try:
        yield
    finally:
        for variable, (value, shape) in zip(variables, before, strict=True):
            variable._value, variable._shape = value, shape


def _overwrite_by_parts(sharding: Sharding, optimizer: Any, variables: Any) -> None:
    pairs = list(zip(variables, getattr(optimizer, _AVERAGES), strict=True))
    in_parts = [
        (v, cut, a)
        for v, a in pairs
        if a is not None and (cut := sharding.cut_of(a)) is not None
    ]
    for pack in sharding.packs([v for v, *_ in in_parts]):
        chosen = [in_parts[i] for i in pack]
        _assign_gathered(sharding, [(v, cut, tf.convert_to_tensor(a)) for v, cut, a in chosen])
    for variable, average in pairs:
        if average is not None and sharding.cut_of(average) is None:
            variable.assign(average)


def _clip_by_norms(
    sharding: Sharding, optimizer: Any, grads: Sequence[Tensor], weights: Sequence[Any]
) -> list[Tensor]:
    """Clips by `clipnorm` or `global_clipnorm`, as Keras does, but by the norms of all parts.

    Keras takes the norm of the rows of a sparse gradient as they come. With `global_clipnorm`
    it also makes the gradient dense.
    """
    given = [i for i, gradient in enumerate(grads) if gradient is not None]
    squares = {i: tf.reduce_sum(tf.square(_values(grads[i]))) for i in given}
    in_parts = [i for i in given if sharding.cut_of(weights[i]) is not None]
    if in_parts:
        dtype = squares[in_parts[0]].dtype
        local = tf.stack([tf.cast(squares[i], dtype) for i in in_parts])
        summed = tf.unstack(sharding.sum(local))
        squares |= {
            i: tf.cast(s, squares[i].dtype) for i, s in zip(in_parts, summed, strict=True)
        }
    clipped = list(grads)
    if optimizer.clipnorm:
        for i in given:
            clipped[i] = _clipped(grads[i], squares[i], optimizer.clipnorm)
        return clipped
    norm = tf.sqrt(tf.reduce_sum(tf.stack([squares[i] for i in given])))
    limit = optimizer.global_clipnorm
    scale = limit * tf.minimum(1.0 / norm, 1.0 / limit) + (norm - norm)
    for i in given:
        clipped[i] = tf.convert_to_tensor(grads[i]) * scale
    return clipped


def _values(gradient: Tensor) -> Tensor:
    return gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient


def _clipped(gradient: Tensor, square: Tensor, limit: float) -> Tensor:
    """Clips a gradient; the same operations as `tf.clip_by_norm`."""
    is_positive = square > 0
    norm = tf.where(is_positive, tf.sqrt(tf.where(is_positive, square, 1.0)), square)
    values = _values(gradient) * limit / tf.maximum(norm, limit)
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
    return values
