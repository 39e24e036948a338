"""What an optimizer does with variables in parts; see `sharded`.

Weights may be in parts too. Then they have the shape of their part here (`showing_parts`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import tensorflow as tf

from tfdist._keras.replica import Tensor
from tfdist._keras.served_updates import trained_by
from tfdist._keras.sharded_weights import cut_in_parts, showing_parts

AVERAGES = "_model_variables_moving_average"  # of an optimizer, a list


class Sharding(Protocol):
    """The parts of one model, for the replacements in Keras's optimizers."""

    def has_parts(self, optimizer: Any) -> bool:
        """Tells whether some of an optimizer's variables are in parts."""

    def cut_of(self, variable: Any) -> Any:
        """Returns the cut of a weight or of an optimizer's variable in parts, or None."""

    def replica_id(self) -> Tensor:
        """Returns the number of the running replica's parts."""

    def packs(self, variables: Sequence[Any]) -> list[list[int]]:
        """Groups variables into packs, whose parts are gathered together."""

    def gather(self, cuts: Sequence[Any], parts: Sequence[Tensor]) -> list[Tensor]:
        """Gathers whole tensors from the parts of all replicas."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Sums a small tensor over all replicas."""

    def divides(self, variable: Any) -> bool:
        """Tells whether a team of replicas computes with the parts of a weight."""

    def counted(self, variable: Any, square: Tensor) -> Tensor:
        """Returns what a part adds to a sum over all replicas, some of which have the same."""

    def join(self, variable: Any) -> Any:
        """Returns the whole value of an optimizer's variable. All processes must call it."""

    def read(self, variable: Any) -> Any:
        """Returns the whole value of a variable as an array, if this process can have it."""


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


def update_parts(
    sharding: Sharding, optimizer: Any, grads: Any, variables: Any, learning_rate: Any
) -> None:
    """Updates this replica's part of each weight, and gathers the parts of whole weights.

    Weights in parts are updated one after the other. TensorFlow would else begin all updates,
    and keep what each of them computes in between at the same time.
    """
    before: list[Tensor] = []
    for pack in sharding.packs(variables):
        updated = []
        for i in pack:
            variable = variables[i]
            cut = sharding.cut_of(variable)
            if cut is None or is_in_parts(variable, cut):
                with tf.control_dependencies(before):
                    optimizer.update_step(grads[i], variable, learning_rate)
                if cut is not None:  # reading it waits for its update
                    before = [tf.convert_to_tensor(variable)]
                continue
            # By the key of the weight, the optimizer finds its slots. They are parts of the
            # same shape.
            part = Part(own_part(sharding, variable, cut), optimizer._var_key(variable))
            optimizer.update_step(grads[i], part, learning_rate)
            updated.append((variable, cut, part.tensor))
        _assign_gathered(sharding, updated)


def own_gradient(sharding: Sharding, gradient: Tensor, variable: Any) -> Tensor:
    """Returns this replica's part of a gradient, which may be in parts already."""
    cut = sharding.cut_of(variable)
    if cut is None or sharding.divides(variable):
        return gradient
    if isinstance(gradient, tf.IndexedSlices):
        return cut.own_rows(gradient, sharding.replica_id())
    if gradient.shape.is_fully_defined() and tuple(gradient.shape) == cut.part_shape:
        return gradient
    return cut.own(gradient, sharding.replica_id())


def is_in_parts(variable: Any, cut: Any) -> bool:
    """Tells whether a variable has the shape of a part now."""
    return tuple(variable.shape) == tuple(cut.part_shape)


def own_part(sharding: Sharding, variable: Any, cut: Any) -> Tensor:
    """Returns this replica's part of a weight, which may be in parts already."""
    value = tf.convert_to_tensor(variable)
    return value if is_in_parts(variable, cut) else cut.own(value, sharding.replica_id())


def _assign_gathered(sharding: Sharding, updated: Sequence[tuple[Any, Any, Tensor]]) -> None:
    """Assigns whole weights, from their cuts and this replica's parts."""
    wholes = sharding.gather([cut for _, cut, _ in updated], [part for *_, part in updated])
    for (variable, *_), whole in zip(updated, wholes, strict=True):
        variable.assign(whole)


def update_whole(
    sharding: Sharding, optimizer: Any, grads: Any, variables: Any, learning_rate: Any
) -> None:
    """Updates whole weights by whole gradients, with state that is gathered for it."""
    slots_of = {id(weight): slots for weight, slots in trained_by(optimizer)}
    averages = {id(v) for v in getattr(optimizer, AVERAGES, ()) or ()}
    for pack in sharding.packs(variables):
        weights = [(variables[i], cut) for i in pack if (cut := cut_in_parts(variables[i]))]
        in_parts = [
            *weights,
            *(
                (slot, cut)
                for i in pack
                for slot in slots_of[id(variables[i])]
                if (cut := sharding.cut_of(slot)) is not None and id(slot) not in averages
            ),
        ]
        shown, cuts = [v for v, _ in in_parts], [cut for _, cut in in_parts]
        keys = [optimizer._var_key(v) for v, _ in weights] + [""] * (len(shown) - len(weights))
        with showing_parts(shown):
            parts = [tf.convert_to_tensor(variable) for variable in shown]
            wholes = list(map(Part, sharding.gather(cuts, parts), keys))
            with _backed_by(shown, wholes):
                for i in pack:
                    optimizer.update_step(grads[i], variables[i], learning_rate)
            for variable, cut, whole in zip(shown, cuts, wholes, strict=True):
                variable.assign(cut.own(whole.tensor, sharding.replica_id()))


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


def overwrite_by_parts(sharding: Sharding, optimizer: Any, variables: Any) -> None:
    """Overwrites weights, whole or in parts, with their moving averages."""
    pairs = list(zip(variables, getattr(optimizer, AVERAGES), strict=True))
    in_parts = [
        (v, cut, a)
        for v, a in pairs
        if a is not None and (cut := sharding.cut_of(a)) is not None and not is_in_parts(v, cut)
    ]
    gathered = {id(v) for v, *_ in in_parts}
    for pack in sharding.packs([v for v, *_ in in_parts]):
        members = [in_parts[i] for i in pack]
        _assign_gathered(sharding, [(v, cut, tf.convert_to_tensor(a)) for v, cut, a in members])
    for variable, average in pairs:
        if average is not None and id(variable) not in gathered:
            variable.assign(average)


def clip_by_norms(
    sharding: Sharding, optimizer: Any, grads: Sequence[Tensor], weights: Sequence[Any]
) -> list[Tensor]:
    """Clips by `clipnorm` or `global_clipnorm`, as Keras does, but by the norms of all parts.

    Keras takes the norm of the rows of a sparse gradient as they come. With `global_clipnorm`
    it also makes the gradient dense.
    """
    present = [i for i, gradient in enumerate(grads) if gradient is not None]
    squares = {i: tf.reduce_sum(tf.square(_values(grads[i]))) for i in present}
    in_parts = [i for i in present if sharding.cut_of(weights[i]) is not None]
    if in_parts:
        dtype = squares[in_parts[0]].dtype
        own = [sharding.counted(weights[i], squares[i]) for i in in_parts]
        local = tf.stack([tf.cast(square, dtype) for square in own])
        summed = tf.unstack(sharding.sum(local))
        squares |= {
            i: tf.cast(s, squares[i].dtype) for i, s in zip(in_parts, summed, strict=True)
        }
    clipped = list(grads)
    if optimizer.clipnorm:
        for i in present:
            clipped[i] = _clipped(grads[i], squares[i], optimizer.clipnorm)
        return clipped
    norm = tf.sqrt(tf.reduce_sum(tf.stack([squares[i] for i in present])))
    limit = optimizer.global_clipnorm
    # As in `tf.clip_by_global_norm`: `norm - norm` is NaN for an infinite norm. So gradients
    # that overflow become NaN, not 0.
    scale = limit * tf.minimum(1.0 / norm, 1.0 / limit) + (norm - norm)
    for i in present:
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
