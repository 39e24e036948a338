"""Tests whether a function of rows returns a number for each row or a mean over rows.

The mean of the batch follows from the means of shares. Any other function needs the whole
batch: for example a Dice loss, a sum, or the mean over the rows of least loss.
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
    """Cuts rows into two or three parts, from whose values a mean can be recognized.

    The last part has two rows. This detects a function that selects a fraction of the rows by
    their rank, such as the lower half: of two rows it selects another fraction.

    Args:
        rows: Number of rows, at least two.

    Returns:
        Begin and end of each part.
    """
    half, last = rows // 2, min(2, rows - rows // 2)
    edges = sorted({0, half, rows - last, rows})
    return list(itertools.pairwise(edges))


def rows_to_try(elements: int, most: int = _ROWS) -> int:
    """Returns a number of rows that is enough to test a function, and takes little time.

    Args:
        elements: Number of elements of a row.
        most: The largest number of rows.
    """
    return max(8, min(most, _ELEMENTS // max(1, elements)))


def is_mean(function: Callable[..., Any], *arguments: Tensor) -> bool | None:
    """Returns whether a function returns a number for each row, or a mean over the rows.

    Args:
        function: A function of tensors of shape [rows, ...].
        arguments: Typical arguments. Only their shapes and dtypes are used.

    Returns:
        True or False, or None if the test is not possible.
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
        except Exception:  # the function may fail on these random arguments in any way
            return None
    if joined is not None:  # has a number for each row, if that is what they are
        return whole.shape[0] == rows and _are_close(whole, joined)
    weights = [(end - begin) / rows for begin, end in parts_of(rows)]
    return _are_close(whole, np.dot(weights, parts))


def _are_close(a: Any, b: Any) -> bool:
    return a.shape == b.shape and np.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True)


def _sample(random: Any, shape: list[int], dtype: Any) -> Tensor:
    # Each row has another distribution, so that a part does not look like the whole.
    rise = np.linspace(0.0, 0.6, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    numbers = 0.05 + rise + random.uniform(0.0, 0.3, shape)
    if not tf.as_dtype(dtype).is_floating:
        numbers = numbers > 0.5
    return tf.cast(numbers, dtype)
