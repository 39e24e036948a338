"""Variables that are on the devices of their stages while a training lasts."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tfdist import _keras
from tfdist.sharding.pipeline.plan import PipelinePlan


class PlacedVariables(contextlib.AbstractContextManager[None]):
    """Moves each variable to the device of its stage, and back.

    Weights take their optimizer's state with them. All other variables, such as metrics, go to
    the last device, where losses are computed. Meanwhile the variables that they come from are
    empty, so a weight is on one device only.

    Args:
        model: The model, which computes in stages inside the context.
        plan: Its stages.
        recomputes: Whether the backward pass computes activations again.
        variables: `keras.Variable`s.
        optimizers: The optimizers that own some of these variables.
    """

    def __init__(
        self,
        model: Any,
        plan: PipelinePlan,
        recomputes: bool,
        variables: Sequence[Any],
        optimizers: Sequence[Any],
    ) -> None:
        self._model = model
        self._plan = plan
        self._recomputes = recomputes
        self._variables = variables
        self._optimizers = optimizers
        self._devices = dict(plan.devices)
        for optimizer in optimizers:
            if optimizer.built:
                for weight, slots in _keras.trained_by(optimizer):
                    if id(weight) in plan.devices:
                        self._devices |= {id(s): plan.devices[id(weight)] for s in slots}
        # The backing variables not in use now: the placed ones outside of the context, the
        # plain ones inside.
        self._unused: list[Any] = []

    def device_of(self, variable: Any) -> str:
        """Returns the device of a variable inside the context.

        Args:
            variable: A `keras.Variable`.
        """
        return self._devices.get(id(variable), self._plan.stages[-1].device)

    def __enter__(self) -> None:
        is_first = not self._unused
        for number, variable in enumerate(self._variables):
            value = tf.convert_to_tensor(variable)
            if is_first:
                self._unused.append(self._placed(variable, value))
            else:
                _keras.refill(self._unused[number], [value])
            del value
            self._swap(number)
        self._reindex()
        for optimizer in self._optimizers:
            _keras.set_updated_in_place(optimizer, True)
        _keras.set_piped(
            self._model, self._plan.piped, self._plan.microbatches, self._recomputes
        )

    def __exit__(self, *_: object) -> None:
        _keras.set_piped(self._model, None, 1, False)
        for optimizer in self._optimizers:
            _keras.set_updated_in_place(optimizer, False)
        for number, variable in enumerate(self._variables):
            _keras.refill(self._unused[number], [tf.convert_to_tensor(variable)])
            self._swap(number)
        self._reindex()

    def _swap(self, number: int) -> None:
        """Gives a variable its other backing variable, and empties the one that it had."""
        former = _keras.swap_value(self._variables[number], self._unused[number])
        _keras.empty(former)
        self._unused[number] = former

    def _reindex(self) -> None:
        for optimizer in self._optimizers:
            _keras.reindex_optimizer(optimizer)

    def _placed(self, variable: Any, value: Any) -> Any:
        with tf.device(self.device_of(variable)):
            return tf.Variable(
                value,
                dtype=variable.dtype,
                trainable=variable.trainable,
                name=variable.name,
            )
