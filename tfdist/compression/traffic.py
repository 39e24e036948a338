"""How many bytes of gradients a step exchanges, with and without compression."""

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

    A ring's all-reduce sends each of them almost twice; metrics and signals, a few hundred
    bytes, are not counted.

    Attributes:
        plain: Without compression.
        compressed: With it.
    """

    plain: int
    compressed: int

    @property
    def ratio(self) -> float:
        """How many times fewer bytes travel with compression."""
        return self.plain / self.compressed if self.compressed else 1.0


def bytes_per_step(model: Any, compression: Any, embedding_rows: int = 0) -> Traffic:
    """Tells how many bytes of gradients a step exchanges, with and without compression.

    Args:
        model: A built `keras.Model`; once it was trained, what its steps update by rows is
            known, before that the tables of its `Embedding` layers are taken.
        compression: As in `fit`. Of `PowerSGD` the mean of its two kinds of steps is given,
            after the first `start_after` ones.
        embedding_rows: Rows that a replica's part of a batch looks up in each table. Rows
            travel as they are, each with its number.

    Returns:
        The bytes.

    Raises:
        ArgumentError: `compression` is none, or the model has no weights yet.

    Example:
        >>> import keras, tfdist
        >>> model = keras.Sequential([keras.Input((1000,)), keras.layers.Dense(1000)])
        >>> tfdist.compression.bytes_per_step(model, tfdist.PowerSGD(rank=2))
        Traffic(plain=4004000, compressed=12000)
    """
    # Keras, which a user who only makes settings has not asked for yet.
    from tfdist.compression.matrices import (
        is_compressed,
        matrix_shape,
        trained_variables,
        updated_by_rows,
    )

    asked = check(compression)
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
            rows = embedding_rows * (row * size + 8)  # an int64 says which
            plain, compressed = plain + rows, compressed + rows
            continue
        plain += number * size
        if isinstance(asked, PowerSGD) and is_compressed(variable, asked, by_rows):
            # Vectors are of 32 bits at least.
            shape = matrix_shape(variable.shape)
            compressed += number / asked.ratio(*shape) * max(size, _WIDE["float32"])
        elif isinstance(asked, str):
            compressed += number * _HALF_BYTES
        else:
            compressed += number * size
    return Traffic(round(plain), round(compressed))
