"""Whether a function of rows gives each a number, or their mean: found by computing it.

A share's mean can be made part of the batch's. What is none, such as a Dice loss or a sum, has
to see the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tfdist._keras.replica import Tensor, on_replica

_ROWS, _CUT = 8, 5
_UNKNOWN_LENGTH = 4


def is_mean(function: Callable[..., Any], *arguments: Tensor) -> bool | None:
    """Tells whether a function gives a number for each row, or a mean over them.

    Args:
        function: Of tensors of shape [rows, ...].
        arguments: Such as it is called with; only their shapes and dtypes are looked at.

    Returns:
        Whether it does; None where it cannot be told.
    """
    shapes = [tf.TensorShape(argument.shape) for argument in arguments]
    if any(shape.rank is None or not shape.rank for shape in shapes):
        return None
    random = np.random.default_rng(0)
    with tf.init_scope(), on_replica(None):
        try:
            values = [
                _sample(random, shape, argument.dtype)
                for shape, argument in zip(shapes, arguments, strict=True)
            ]
            whole, first, last = (
                np.asarray(function(*(value[part] for value in values)), np.float64)
                for part in (slice(None), slice(None, _CUT), slice(_CUT, None))
            )
        except Exception:  # whatever the function makes of numbers that it was not made for
            return None
    if whole.ndim:  # a number for each row
        return bool(whole.shape[0] == _ROWS)
    share = _CUT / _ROWS
    return np.allclose(whole, share * first + (1 - share) * last, rtol=1e-4, atol=1e-6)


def _sample(random: Any, shape: Any, dtype: Any) -> Tensor:
    dims = [_UNKNOWN_LENGTH if size is None else size for size in shape[1:]]
    numbers = random.uniform(0.05, 0.95, (_ROWS, *dims))
    if not tf.as_dtype(dtype).is_floating:
        numbers = numbers > 0.5
    return tf.cast(numbers, dtype)
