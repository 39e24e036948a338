"""Updates of weights that are on several devices of a process: each on its weight's device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

Tensor = Any
_UPDATE, _DECAY = "update_step", "_apply_weight_decay"


def set_updated_in_place(optimizer: Any, in_place: bool) -> None:
    """Makes an optimizer compute each update on the device of the weight, or as ever.

    Relies on Keras, which looks up these methods on the instance.

    Args:
        optimizer: A `keras.Optimizer`.
        in_place: Whether to compute there.
    """
    attributes = vars(optimizer)
    for name in (_UPDATE, _DECAY):
        attributes.pop(name, None)
    if not in_place:
        return

    def update_step(gradient: Tensor, variable: Any, learning_rate: Any) -> None:
        with tf.device(_device(variable)):
            type(optimizer).update_step(optimizer, gradient, variable, learning_rate)

    def apply_weight_decay(variables: Sequence[Any]) -> None:
        for variable in variables:
            with tf.device(_device(variable)):
                type(optimizer)._apply_weight_decay(optimizer, [variable])

    # Not with `setattr`, which Keras watches for variables.
    attributes[_UPDATE] = update_step
    attributes[_DECAY] = apply_weight_decay


def _device(variable: Any) -> Any:
    value = variable._value if isinstance(variable, keras.Variable) else variable
    return getattr(value, "device", None)
