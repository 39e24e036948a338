"""Along which axis a team had best divide each weight, by the layer that has it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras

from tfdist._keras.parallel_chains import cut_of_einsum
from tfdist._keras.parallel_plan import ATTENTION

Division = tuple[int, int]
"""The id of a `keras.Variable`, and one of its axes."""


def dividing_axes(model: Any, ways: int) -> Iterator[Division]:
    """Chooses the axis along which each weight is divided.

    Args:
        model: A built `keras.Model`.
        ways: Number of parts.

    Yields:
        The id and the axis of each weight that can be divided.
    """
    layers = list({id(layer): layer for layer in model._flatten_layers()}.values())
    of_attention: set[int] = set()
    for layer in layers:
        if type(layer) in ATTENTION:
            found, parts = _of_attention(layer, ways)
            of_attention |= set(map(id, parts))
            yield from found
    for layer in layers:
        if id(layer) in of_attention:
            continue
        kernel = getattr(layer, "_kernel", None)
        is_dense = type(layer) is keras.layers.Dense
        if (is_dense or type(layer) is keras.layers.EinsumDense) and kernel is not None:
            yield from _of_product(layer, kernel, ways, is_dense)
        elif type(layer) is keras.layers.Embedding:
            table = getattr(layer, "_embeddings", None)
            axes = [] if table is None else [a for a in (0, 1) if table.shape[a] % ways == 0]
            if axes:
                yield id(table), axes[0]
        else:
            for weight in layer._trainable_variables:
                if len(weight.shape) > 1:
                    yield from _largest(weight, ways)


def _of_attention(layer: Any, ways: int) -> tuple[list[Division], list[Any]]:
    names = ("_query_dense", "_key_dense", "_value_dense", "_gate_dense")
    inner = [getattr(layer, name) for name in names if hasattr(layer, name)]
    last = layer._output_dense
    parts = [*inner, last]
    if any(dense._kernel.shape[1] % ways for dense in inner):
        # Not by heads, which would be refused.
        pairs = [(d._kernel, 1) for d in inner] + [(last._kernel, 0)]
        return [found for k, head in pairs for found in _largest(k, ways, but=head)], parts
    found = [(id(dense._kernel), 1) for dense in inner] + [(id(last._kernel), 0)]
    found += [(id(dense.bias), 0) for dense in inner if dense.bias is not None]
    return found, parts


def _of_product(layer: Any, kernel: Any, ways: int, is_dense: bool) -> Iterator[Division]:
    if is_dense:
        inputs, outputs = kernel.shape
        wanted = (1, 0) if outputs >= inputs else (0, 1)
        axes = [axis for axis in wanted if kernel.shape[axis] % ways == 0]
    else:
        axes = [axis for _, axis in _largest(kernel, ways)]
    if not axes:
        return
    yield id(kernel), axes[0]
    cut = None if is_dense else cut_of_einsum(layer.equation, axes[0])
    column = -1 if is_dense and axes[0] == 1 else None
    if cut is not None and cut.is_column:
        column = cut.axis
    bias = layer.bias
    if column is None or bias is None or len(bias.shape) < -column:
        return
    if bias.shape[column] == kernel.shape[axes[0]]:
        yield id(bias), len(bias.shape) + column


def _largest(weight: Any, ways: int, but: int | None = None) -> list[Division]:
    axes = [a for a, size in enumerate(weight.shape) if size % ways == 0 and a != but]
    # Of equal axes the last one: the outputs, of most layers.
    return [(id(weight), max(axes, key=lambda a: (weight.shape[a], a)))] if axes else []
