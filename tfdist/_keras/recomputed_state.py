"""The variables and losses of a layer while it is called for the first and the second time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.common import global_state as _global_state

from tfdist._keras.recomputed_ops import ops_of_thread
from tfdist._keras.sharded_weights import InParts
from tfdist.errors import ArgumentError

Tensor = Any


def _scope() -> Any:
    return _global_state.get_global_attribute("stateless_scope")


class FirstPass(keras.StatelessScope):  # type: ignore[misc]
    """A scope in which variables are read and assigned as outside, and their values are noted.

    Relies on `keras.Variable`, which asks the scope for its value and passes it assignments.

    Args:
        values: Values of variables that are read already, by the variables' ids.

    Attributes:
        values: The value of each variable before the layer was called, by the variable's id.
        writes: Names of the ops that assign variables.
        losses: The losses that the layer's parts have added.
    """

    def __init__(self, values: dict[int, Tensor] | None = None) -> None:
        super().__init__(collect_losses=True, initialize_variables=False)
        self.values: dict[int, Tensor] = dict(values or {})
        self.writes: set[str] = set()
        self._variables: dict[int, Any] = {}
        self._assigned: set[int] = set()
        self._changed_inside: list[Any] = []
        self._outer = _scope()
        self._graph = tf.compat.v1.get_default_graph()

    @property
    def _is_inside(self) -> bool:
        """Whether the graph of a loop or branch is traced, not that of the layer."""
        return tf.compat.v1.get_default_graph() is not self._graph

    def get_current_value(self, variable: Any) -> Any:
        """Returns the value of a variable, or None to let it be read.

        Args:
            variable: The `keras.Variable`.
        """
        if tf.executing_eagerly():  # in a `tf.init_scope`
            return None
        self._note(variable)
        # In a loop, the value may differ from that at the layer's beginning.
        if id(variable) in self._assigned or self._is_inside:
            return None if self._outer is None else self._outer.get_current_value(variable)
        return self.values[id(variable)]

    def add_update(self, update: tuple[Any, Tensor]) -> None:
        """Assigns a variable.

        Args:
            update: The `keras.Variable` and its value.
        """
        variable, value = update
        if not tf.executing_eagerly():
            self._note(variable)
            self._assigned.add(id(variable))
            if self._is_inside:
                self._changed_inside.append(variable)
        ops = ops_of_thread(self._graph)
        begin = len(ops)
        if self._outer is None:
            variable._direct_assign(value)
        else:
            self._outer.add_update(update)
        self.writes |= {op.name for op in ops[begin:]}

    def _note(self, variable: Any) -> None:
        if id(variable) in self.values:
            return
        # In the graph of the layer, even if a loop is the first to use the variable.
        with self._graph.as_default():
            value = None if self._outer is None else self._outer.get_current_value(variable)
            if value is None:
                value = variable._value
            if value is None:
                value = self._initialized(variable)
            self._variables[id(variable)] = variable
            self.values[id(variable)] = tf.identity(value)

    def _initialized(self, variable: Any) -> Any:
        """Initializes a variable that the layer has just made."""
        # In a stateless scope Keras puts off the first value of a new variable. The value is
        # needed now, so the scope is left for a moment.
        waiting = _global_state.get_global_attribute("uninitialized_variables", [])
        waiting[:] = [other for other in waiting if other is not variable]
        _global_state.set_global_attribute("stateless_scope", None)
        try:
            variable._deferred_initialize()
        finally:
            _global_state.set_global_attribute("stateless_scope", self)
        return variable._value

    def raw_variables(self, accessed: Sequence[Any]) -> list[Any]:
        """Returns the variables that no `keras.Variable` of this scope is backed by.

        Args:
            accessed: `tf.Variable`s.
        """
        backing: list[Any] = []
        for variable in self._variables.values():
            value = variable._value
            value = value.part if isinstance(value, InParts) else value
            is_split = isinstance(value, tf.distribute.DistributedValues)
            backing += [value, *value.values] if is_split else [value]
        ids = {id(value) for value in backing}
        return [variable for variable in accessed if id(variable) not in ids]

    def refuse_changes_inside(self, layer: Any) -> None:
        """Refuses a layer that changes variables in a loop or branch of the graph.

        Args:
            layer: The layer.

        Raises:
            ArgumentError: It does.
        """
        if self._changed_inside:
            raise ArgumentError(
                "A layer whose activations are recomputed must not change variables in a loop "
                f"or branch of the graph. Received: layer {layer.name!r}, which changes "
                f"{self._changed_inside[0].path!r} there. Leave the layer out of `layers` of "
                "tfdist.recompute."
            )

    def hand_over_losses(self, layer: Any, losses: Sequence[Tensor]) -> None:
        """Gives losses to the parts of a layer that have added them.

        Relies on `Layer._losses` and `Layer._loss_ids`.

        Args:
            layer: The layer.
            losses: Tensors in place of `self.losses`.
        """
        # A layer knows its losses by the ids of tensors, which are others now.
        for former, loss in zip(self.losses, losses, strict=True):
            parts = [p for p in layer._flatten_layers() if id(former) in p._loss_ids]
            owner = parts[0] if parts else layer
            owner._loss_ids.discard(id(former))
            if self._outer is None:
                owner._losses.append(loss)
            elif self._outer.collect_losses:
                self._outer.add_loss(loss)
                owner._loss_ids.add(id(loss))


class SecondPass(keras.StatelessScope):  # type: ignore[misc]
    """A scope in which variables begin with given values, and assignments end with the scope.

    Args:
        values: The values, by the variables' ids.
    """

    def __init__(self, values: dict[int, Tensor]) -> None:
        super().__init__(collect_losses=True, initialize_variables=False)
        self._values = dict(values)

    @property
    def values(self) -> dict[int, Tensor]:
        """The values of the variables that have one in this scope, by their ids."""
        return self._values

    def get_current_value(self, variable: Any) -> Any:
        """Returns the value of a variable in this scope.

        Args:
            variable: The `keras.Variable`.
        """
        return self._values.get(id(variable))

    def add_update(self, update: tuple[Any, Tensor]) -> None:
        """Changes the value of a variable in this scope.

        Args:
            update: The `keras.Variable` and its value.
        """
        variable, value = update
        value = tf.cast(value, variable._dtype)
        before = self._values.get(id(variable))
        if before is not None and value.dtype.is_floating:
            value = _assigned(before, value)
        self._values[id(variable)] = value

    def forget_losses(self, layer: Any) -> None:
        """Removes the losses of the second pass from the layer's parts.

        Args:
            layer: The layer.
        """
        ids = {id(loss) for loss in self.losses}
        for part in layer._flatten_layers():
            part._loss_ids -= ids


@tf.custom_gradient  # type: ignore[untyped-decorator]
def _assigned(before: Tensor, value: Tensor) -> tuple[Tensor, Any]:
    """Returns a value, with the gradient of the variable to which it is assigned."""
    return tf.identity(value), lambda upstream: (upstream, None)
