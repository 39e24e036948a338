"""Whether a function of rows gives each a number, or their mean: found by computing it.

A share's mean can be made part of the batch's. What is none, such as a Dice loss, a sum, or the
rows of least loss, has to see the whole batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tfdist._keras.replica import Tensor, on_replica

_ROWS, _ELEMENTS = 64, 2**18
_UNKNOWN_LENGTH = 4


def parts_of(rows: int) -> list[tuple[int, int]]:
    """Cuts rows into parts that tell a mean from what only looks like one.

    The last part is of two rows: what keeps a share of the rows by their rank, such as the
    lower half, keeps another share of two.

    Args:
        rows: How many, at least two.

    Returns:
        Where each part begins and ends, two or three.
    """
    half, last = rows // 2, min(2, rows - rows // 2)
    edges = sorted({0, half, rows - last, rows})
    return list(itertools.pairwise(edges))


def rows_to_try(elements: int, most: int = _ROWS) -> int:
    """Gives how many rows are enough to see what a function does, and take no long time.

    Args:
        elements: Numbers in a row.
        most: Rows at most.
    """
    return max(8, min(most, _ELEMENTS // max(1, elements)))


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
    lengths = [[_UNKNOWN_LENGTH if size is None else size for size in s[1:]] for s in shapes]
    rows = rows_to_try(sum(math.prod(length) for length in lengths))
    with tf.init_scope(), on_replica(None):
        try:
            values = [
                _sample(random, [rows, *length], argument.dtype)
                for length, argument in zip(lengths, arguments, strict=True)
            ]
            whole, *parts = (
                np.asarray(function(*(value[begin:end] for value in values)), np.float64)
                for begin, end in ((0, rows), *parts_of(rows))
            )
            joined = np.concatenate(parts) if whole.ndim else None
        except Exception:  # whatever the function makes of numbers that it was not made for
            return None
    if joined is not None:  # a number for each row, or what only looks so
        return whole.shape[0] == rows and _are_close(whole, joined)
    weights = [(end - begin) / rows for begin, end in parts_of(rows)]
    return _are_close(whole, np.dot(weights, parts))


def _are_close(one: Any, other: Any) -> bool:
    alike = one.shape == other.shape
    return alike and np.allclose(one, other, rtol=1e-4, atol=1e-6, equal_nan=True)


def _sample(random: Any, shape: list[int], dtype: Any) -> Tensor:
    # The rows differ in what they are drawn from, so that parts are no small copies of all.
    rise = np.linspace(0.0, 0.6, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    numbers = 0.05 + rise + random.uniform(0.0, 0.3, shape)
    if not tf.as_dtype(dtype).is_floating:
        numbers = numbers > 0.5
    return tf.cast(numbers, dtype)
