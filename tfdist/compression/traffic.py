"""Computes the bytes of gradients that a step exchanges, with and without compression."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tfdist.compression.settings import PowerSGD, check
from tfdist.errors import ArgumentError

_WIDE = {"float32": 4, "float64": 8}
_HALF_BYTES = 2


@dataclass(frozen=True)
class Traffic:
    """Bytes of gradients that each replica contributes to the sum of one step.

    A ring all-reduce sends each byte almost twice. Metrics and signals are not counted: they
    are a few hundred bytes.

    Attributes:
        plain: Bytes without compression.
        compressed: Bytes with compression.
    """

    plain: int
    compressed: int

    @property
    def ratio(self) -> float:
        """The factor by which compression reduces the bytes."""
        return self.plain / self.compressed if self.compressed else 1.0


def bytes_per_step(model: Any, compression: Any, embedding_rows: int = 0) -> Traffic:
    """Computes the bytes of gradients that a step exchanges, with and without compression.

    Args:
        model: A built `keras.Model`. If it has been trained, the variables with sparse
            gradients are known. Otherwise they are the tables of its `Embedding` layers.
        compression: As in `fit`. The result for `PowerSGD` is the mean of its two kinds of
            steps, after the first `start_after` steps.
        embedding_rows: Rows that a replica's part of a batch looks up in each table. Rows are
            not compressed, and each is sent with its number.

    Returns:
        The bytes.

    Raises:
        ArgumentError: `compression` is not valid, or the model has no weights yet.

    Example:
        >>> import keras, tfdist
        >>> model = keras.Sequential([keras.Input((1000,)), keras.layers.Dense(1000)])
        >>> tfdist.compression.bytes_per_step(model, tfdist.PowerSGD(rank=2))
        Traffic(plain=4004000, compressed=12000)
    """
    # This imports Keras, which settings alone do not need.
    from tfdist.compression.matrices import (
        is_compressed,
        matrix_shape,
        trained_variables,
        updated_by_rows,
    )

    settings = check(compression)
    if not model.built:
        raise ArgumentError(
            "`model` must be built, so that its weights have shapes. Received: "
            f"model={model.name!r} without weights. Give it a `keras.Input`, call it once, or "
            "train it first."
        )
    by_rows = updated_by_rows(model)
    plain = compressed = 0.0
    for variable in trained_variables(model):
        size = _WIDE.get(str(variable.dtype), _HALF_BYTES)
        number = math.prod(variable.shape)
        if id(variable) in by_rows:
            row = number // max(1, int(variable.shape[0]))
            rows = embedding_rows * (row * size + 8)  # each row has an int64 number
            plain, compressed = plain + rows, compressed + rows
            continue
        plain += number * size
        if isinstance(settings, PowerSGD) and is_compressed(variable, settings, by_rows):
            # Vectors have at least 32 bits.
            shape = matrix_shape(variable.shape)
            compressed += number / settings.ratio(*shape) * max(size, _WIDE["float32"])
        elif isinstance(settings, str):
            compressed += number * _HALF_BYTES
        else:
            compressed += number * size
    return Traffic(round(plain), round(compressed))
