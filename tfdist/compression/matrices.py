"""Chooses the gradients that PowerSGD compresses, and their shapes as matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras

from tfdist import _keras
from tfdist.compression.settings import PowerSGD
from tfdist.step.composition import traced_steps
from tfdist.step.state import optimizers_of


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Returns a kernel's shape as a matrix: the product of all dimensions but the last one.

    Args:
        shape: A shape with at least two dimensions.
    """
    return math.prod(shape[:-1]), int(shape[-1])


def is_compressed(variable: Any, settings: PowerSGD, by_rows: set[int]) -> bool:
    """Returns whether a variable's gradient is sent in low rank.

    Args:
        variable: A `keras.Variable`.
        settings: The settings.
        by_rows: The ids of variables whose gradients are sparse.
    """
    if len(variable.shape) < 2 or id(variable) in by_rows:
        return False
    rows, columns = matrix_shape(variable.shape)
    if settings.rank >= min(rows, columns):  # uncompressed it needs no more bytes, and is exact
        return False
    return settings.ratio(rows, columns) >= settings.min_ratio


def trained_variables(model: Any) -> list[Any]:
    """Lists the variables that get gradients, each once.

    Args:
        model: A built `keras.Model`.
    """
    of_optimizers = [v for o in optimizers_of(model) for v in _keras.trained_variables(o)]
    return list({id(v): v for v in [*model.trainable_variables, *of_optimizers]}.values())


def updated_by_rows(model: Any) -> set[int]:
    """Finds the variables with sparse gradients, such as embeddings.

    Args:
        model: A built `keras.Model`.

    Returns:
        Their ids. They come from the trace of the model's step if there is one. Otherwise
        they are those of all `Embedding` layers that do not share their table.
    """
    steps = traced_steps(model)
    if any(step.optimizers for step in steps):
        return {id(variable) for step in steps for variable in step.by_rows}
    tables = [o for o in _keras.layers_of(model) if isinstance(o, keras.layers.Embedding)]
    return {id(t.embeddings) for t in tables if not getattr(t, "tie_weights", False)}
