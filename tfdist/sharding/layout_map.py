"""`tfdist.layout_map`: along which axis each weight of a model is divided, by its layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import keras

from tfdist import _keras
from tfdist.errors import ArgumentError
from tfdist.strategies.model_parallel import ModelParallel

Axes = tuple[str | None, ...]


def layout_map(model: Any, mesh: Mapping[str, int]) -> dict[str, Axes]:
    """Chooses along which axis each weight of a model is divided.

    Attention is divided by heads. A Dense is divided by its outputs if it has at least as many
    of them as inputs, else by its inputs, so that the two layers of a feed-forward block fit
    together (Shoeybi et al., "Megatron-LM", 2019, section 3). An Embedding is divided by rows.
    Of all other weights with two or more dimensions, the largest axis that can be divided is.

    Args:
        model: A built `keras.Model`.
        mesh: The axes of a mesh and their sizes, as in `tfdist.ModelParallel`.

    Returns:
        A map for `tfdist.ModelParallel`, which you can change: a pattern for each weight that
        is divided, and an axis of the mesh or None for each of its dimensions. A weight that
        cannot be divided, and most weights of one dimension, are left out.

    Raises:
        ArgumentError: The model is not built, or the mesh has no axis, besides that of the
            batch, of more than one device; or several.

    Example:
        >>> import keras, tfdist
        >>> layers = [keras.Input((8,)), keras.layers.Dense(32, name="up")]
        >>> model = keras.Sequential([*layers, keras.layers.Dense(8, name="down")], name="net")
        >>> for pattern, axes in tfdist.layout_map(model, {"batch": 2, "model": 2}).items():
        ...     print(pattern, axes)
        up/kernel (None, 'model')
        up/bias ('model',)
        down/kernel ('model', None)
    """
    if not isinstance(model, keras.Model) or not model.built:
        raise ArgumentError(
            "`model` must be a built keras.Model. Received: "
            f"model={model!r}. Give it an Input, or call it once."
        )
    name = ModelParallel("auto", mesh).model_axis
    if name is None:
        raise ArgumentError(
            "`mesh` must have one axis of several devices besides that of the batch. Received: "
            f'mesh={mesh!r}. For example: {{"batch": 2, "model": 2}}.'
        )
    layouts: dict[str, Axes] = {}
    axes = dict(_keras.dividing_axes(model, dict(mesh)[name]))
    for variable in model.weights:
        axis = axes.get(id(variable))
        if axis is not None:
            layout: list[str | None] = [None] * len(variable.shape)
            layout[axis] = name
            layouts[re.escape(variable.path)] = tuple(layout)
    return layouts
