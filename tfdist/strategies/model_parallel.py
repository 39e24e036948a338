"""`tfdist.ModelParallel`: the weights that a map of layouts names, in parts on the replicas."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import keras

from tfdist import _keras
from tfdist.cluster.mesh_text import parse_mesh
from tfdist.errors import ArgumentError

_VARIABLE = "TFDIST_MESH"  # set by `tfdist run --mesh`
Layouts = tuple[tuple[str, tuple[str | None, ...]], ...]


@dataclass(frozen=True)
class ModelParallel:
    """Divides the weights that a map names over devices, and computes their layers in parts.

    A map says along which axis of the mesh a weight is divided. Dense, EinsumDense, Embedding,
    MultiHeadAttention and GroupQueryAttention compute with their slices along one axis, that
    of the model (Shoeybi et al., "Megatron-LM", 2019). Any other weight that the map names is
    divided over all devices of the mesh, and gathered where a layer reads it, as with
    `Zero(stage=3)`. Each device has its own part of each batch. The trained weights are those
    of one process.

    Args:
        layout_map: A `keras.distribution.LayoutMap`; or a dict that maps regular expressions,
            which match whole paths of variables, to an axis or None for each dimension; or
            "auto" for `tfdist.layout_map`. Without a mesh, "auto" gathers all weights but the
            smallest.
        mesh: The axes and their sizes, such as `{"batch": 2, "model": 2}`. Their product must
            be the number of replicas. None takes the mesh of a `LayoutMap`.
        on: As in `tfdist.Zero`.
        gather_again: As in `tfdist.Zero`, for layers that gather.
        batch_dim_name: The axis of the mesh along which weights are not divided by layers. None
            for "batch" or "data", or else the first one of several.

    Raises:
        ArgumentError: An argument is malformed, or a layout names an axis that is not there.

    Example:
        >>> import tfdist  # doctest: +SKIP
        >>> layouts = {".*dense.*/kernel": (None, "model")}
        >>> strategy = tfdist.ModelParallel(layouts, mesh={"batch": 2, "model": 2})
        >>> tfdist.fit(model, x, y, strategy=strategy)
    """

    layout_map: Any
    mesh: Any = None
    on: Any = "auto"
    gather_again: bool = True
    batch_dim_name: str | None = None

    stage: ClassVar[int] = 3

    def __post_init__(self) -> None:
        layouts, mesh = self.layout_map, self.mesh
        if isinstance(layouts, keras.distribution.LayoutMap):
            if mesh is None and layouts.device_mesh is not None:
                names, sizes = layouts.device_mesh.axis_names, layouts.device_mesh.shape
                mesh = dict(zip(names, map(int, sizes), strict=True))
            layouts = {pattern: layout.axes for pattern, layout in layouts.items()}
        if mesh is not None and not isinstance(mesh, Mapping | tuple):
            _refuse("`mesh` must map names of axes to sizes", f"mesh={mesh!r}")
        if isinstance(layouts, Mapping):
            if mesh is None:
                _refuse("`mesh` must be given with a map of layouts", "mesh=None")
            layouts = tuple((str(pattern), tuple(axes)) for pattern, axes in layouts.items())
        elif layouts != "auto" and not isinstance(layouts, tuple):
            _refuse(
                '`layout_map` must be a LayoutMap, a dict or "auto"', f"layout_map={layouts!r}"
            )
        # Tuples, by which sessions can be told apart.
        object.__setattr__(self, "layout_map", layouts)
        object.__setattr__(self, "mesh", mesh if mesh is None else tuple(dict(mesh).items()))
        for pattern, axes in layouts if isinstance(layouts, tuple) else ():
            for axis in filter(None, axes):
                if axis not in self.axes:
                    _refuse(
                        f"Layouts must name axes of the mesh, {self.axes}",
                        f"{pattern!r}: {axes!r}",
                    )

    @property
    def axes(self) -> dict[str, int]:
        """The axes of the mesh and their sizes."""
        return dict(self.mesh or ())

    @property
    def batch_axis(self) -> str | None:
        """The axis of the mesh along which teams differ."""
        if self.batch_dim_name is not None or not self.axes:
            return self.batch_dim_name
        usual = next((name for name in ("batch", "data") if name in self.axes), None)
        return usual or (next(iter(self.axes)) if len(self.axes) > 1 else None)

    @property
    def model_axis(self) -> str | None:
        """The axis of the mesh along which layers are computed in parts, or None."""
        named = set(self.axes)
        if isinstance(self.layout_map, tuple):
            named = {axis for _, axes in self.layout_map for axis in axes if axis is not None}
        others = [n for n in self.axes if n in named - {self.batch_axis} and self.axes[n] > 1]
        return others[0] if len(others) == 1 else None

    @property
    def devices(self) -> int | None:
        """Number of devices of the mesh, or None for any number."""
        return None if self.mesh is None else math.prod(self.axes.values())


def of_keras(distribution: Any) -> ModelParallel:
    """Returns what a distribution of Keras's asks for.

    Args:
        distribution: A `keras.distribution.ModelParallel`.
    """
    layout_map = _keras.layout_map_of(distribution)
    return ModelParallel(layout_map, batch_dim_name=distribution.batch_dim_name)


def mesh_of_environment() -> ModelParallel | None:
    """Returns what `tfdist run --mesh` asks for, or None.

    Raises:
        ArgumentError: The environment variable has no meaning.
    """
    text = os.environ.get(_VARIABLE)
    return ModelParallel("auto", parse_mesh(text)) if text else None


def _refuse(expected: str, received: str) -> None:
    raise ArgumentError(
        f"{expected}. Received: {received}. For example: tfdist.ModelParallel("
        '{".*dense.*/kernel": (None, "model")}, mesh={"batch": 1, "model": 2}).'
    )
