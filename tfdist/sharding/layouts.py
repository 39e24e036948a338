"""Which weights a map of layouts cuts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tfdist.errors import ArgumentError
from tfdist.strategies.model_parallel import Layouts


def named_by(layouts: Layouts, variables: Sequence[Any]) -> dict[int, tuple[str | None, ...]]:
    """Finds the variables that a map divides.

    Args:
        layouts: Patterns, which match whole paths, and axes.
        variables: The `keras.Variable`s of a model.

    Returns:
        Their layouts, by the variables' ids.

    Raises:
        ArgumentError: A pattern matches no variable, two match the same one, or a layout has
            another number of dimensions than the variable.
    """
    matches: dict[int, tuple[str, tuple[str | None, ...]]] = {}
    for pattern, axes in layouts:
        matching = [v for v in variables if re.fullmatch(pattern, v.path)]
        if not matching:
            some = ", ".join(repr(v.path) for v in variables[:3])
            raise ArgumentError(
                "Each pattern of a layout map must match the path of a weight (layouts of "
                f"activations are not supported). Received: {pattern!r}, but the paths are "
                f"{some} and so on. Print `v.path` of `model.weights`."
            )
        for variable in matching:
            if id(variable) in matches:
                raise ArgumentError(
                    "Each weight must match one pattern of a layout map. Received: "
                    f"{matches[id(variable)][0]!r} and {pattern!r}, which both match "
                    f"{variable.path!r}. Change one of them."
                )
            if len(axes) != len(variable.shape):
                raise ArgumentError(
                    "A layout must have an axis or None for each dimension. Received: "
                    f"{pattern!r}: {axes!r} for {variable.path!r} of shape "
                    f"{tuple(variable.shape)}. Give {len(variable.shape)} of them."
                )
            matches[id(variable)] = pattern, axes
    return {key: axes for key, (_, axes) in matches.items() if any(axes)}


def divided_along(
    layouts: Mapping[int, tuple[str | None, ...]], name: str, mesh: Mapping[str, int]
) -> dict[int, int]:
    """Finds the variables that are divided along one axis of the mesh, and along no other.

    Args:
        layouts: The result of `named_by`.
        name: The axis of the mesh.
        mesh: The axes of the mesh and their sizes.

    Returns:
        The variables' own axis that is divided, by their ids.
    """
    return {
        key: axes.index(name)
        for key, axes in layouts.items()
        if [axis for axis in axes if axis is not None and mesh[axis] > 1] == [name]
    }
