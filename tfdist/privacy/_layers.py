"""The only file of privacy that touches what Keras keeps private.

`tests/test_privacy_clipping.py` has the contract tests.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


def own_variables(layer: Any) -> list[Any]:
    """Lists the trainable variables a layer has itself, not through its sublayers.

    Relies on `Layer._trainable_variables`, which its tracker fills.

    Args:
        layer: A built `keras.Layer`.
    """
    return [v for v in layer._trainable_variables if layer.trainable and v.trainable]


def sublayers(layer: Any) -> list[Any]:
    """Lists the layers that a layer holds directly.

    Relies on `Layer._flatten_layers`.

    Args:
        layer: A `keras.Layer`.
    """
    return list(layer._flatten_layers(include_self=False, recursive=False))


@contextlib.contextmanager
def called_through(layer: Any, function: Callable[..., Any]) -> Iterator[None]:
    """Has `function(call, *args, **kwargs)` called where Keras calls `layer.call`.

    Relies on `Layer.__call__` looking `call` up on the instance, with the arguments cast
    and masks filled in before, and under the scope that casts variables.

    Args:
        layer: A built `keras.Layer`.
        function: Gets the layer's own `call` and its arguments.
    """
    call = layer.call
    had = vars(layer).get("call")

    def through(*args: Any, **kwargs: Any) -> Any:
        return function(call, *args, **kwargs)

    vars(layer)["call"] = through
    try:
        yield
    finally:
        if had is None:
            del vars(layer)["call"]
        else:
            vars(layer)["call"] = had


@contextlib.contextmanager
def changed(layer: Any, **attributes: Any) -> Iterator[None]:
    """Gives a layer's attributes other values, past its tracker, which is locked once built.

    Args:
        layer: A `keras.Layer`.
        **attributes: The values.
    """
    before = {name: vars(layer)[name] for name in attributes}
    vars(layer).update(attributes)
    try:
        yield
    finally:
        vars(layer).update(before)


def has_mask(tensor: Any) -> bool:
    """Tells whether Keras has attached a mask to a tensor.

    Relies on the attribute `_keras_mask`.

    Args:
        tensor: What a layer returned.
    """
    return getattr(tensor, "_keras_mask", None) is not None


def is_plain(layer: Any) -> bool:
    """Tells whether a layer uses its kernel as it is: no LoRA, no quantization.

    Args:
        layer: A `keras.Layer`.
    """
    return (
        not getattr(layer, "lora_enabled", False)
        and getattr(layer, "quantization_mode", None) is None
    )


def seeds(layer: Any) -> list[Any]:
    """Lists the states of a layer's random numbers.

    Relies on their name.

    Args:
        layer: A `keras.Layer`.
    """
    return [v for v in layer.non_trainable_variables if v.name == "seed_generator_state"]


def is_compiled_mean(loss: Any) -> bool:
    """Tells whether a compiled loss is a mean over the examples.

    Args:
        loss: One leaf of `model.loss`.
    """
    means = ("sum_over_batch_size", "mean", "mean_with_sample_weight")
    return isinstance(loss, str) or getattr(loss, "reduction", None) in means
