"""Finds what differs if the workers do not have the same data."""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist.data import leaves
from tfdist.data.source import Source
from tfdist.strategies.base import Strategy

_BLOCKS = 64


def difference(source: Source, strategy: Strategy) -> str | None:
    """Finds what differs; every worker calls it, and gets the same result.

    Args:
        source: The data.
        strategy: The strategy of the workers.

    Returns:
        The difference, for a message; None if no difference was found.
    """
    reference = source.common_data
    leaves_by_name = _leaves_by_name(source.spec() if reference is None else reference)
    shapes = {
        name: f"{tuple(leaf.shape)} {leaf.dtype.name}" for name, leaf in leaves_by_name.items()
    }
    by_worker = strategy.gather_objects(shapes)
    for name in dict.fromkeys(itertools.chain(*by_worker)):
        values = [shapes.get(name, "none") for shapes in by_worker]
        if len(set(values)) > 1:
            listed = "; ".join(f"worker {i}: {shape}" for i, shape in enumerate(values))
            return f"another shape or type of {name}: {listed}"
    if reference is None:
        return None
    digests = {
        name: _digests(leaf, 0, int(leaf.shape[0])) for name, leaf in leaves_by_name.items()
    }
    by_worker = strategy.gather_objects(digests)
    differing = [
        name for name in leaves_by_name if any(d[name] != by_worker[0][name] for d in by_worker)
    ]
    if not differing:
        return None
    first, *others = differing
    row, workers = _first_row(leaves_by_name[first], strategy)
    others = [f"{name} differs too" for name in others]
    return "; ".join(
        [
            f"other values of {first}, of shape {tuple(leaves_by_name[first].shape)}: row "
            f"{row} is the first that worker {', '.join(map(str, workers))} has unlike "
            "worker 0",
            *others,
        ]
    )


def _first_row(column: Any, strategy: Strategy) -> tuple[int, list[int]]:
    """Finds the first row that differs, and the workers whose row differs from worker 0's."""
    begin, end = 0, int(column.shape[0])
    while True:
        by_worker = strategy.gather_objects(_digests(column, begin, end))
        by_block = list(zip(*by_worker, strict=True))
        number = next(i for i, digests in enumerate(by_block) if len(set(digests)) > 1)
        begin, end = _blocks(begin, end)[number]
        if end - begin == 1:
            digests = by_block[number]
            return begin, [i for i, digest in enumerate(digests) if digest != digests[0]]


def _blocks(begin: int, end: int) -> list[tuple[int, int]]:
    edges = np.linspace(begin, end, min(_BLOCKS, end - begin) + 1).astype(int)
    return list(itertools.pairwise(edges.tolist()))


def _digests(column: Any, begin: int, end: int) -> list[bytes]:
    return [_digest(column, *block) for block in _blocks(begin, end)]


def _digest(column: Any, begin: int, end: int) -> bytes:
    rows = leaves.gather(column, tf.range(begin, end, dtype=tf.int64))
    return hashlib.sha256(leaves.content(rows)).digest()[:8]


def _leaves_by_name(batch: Any) -> dict[str, Any]:
    """Names the leaves of a batch by the arguments of `fit` from which they come."""
    named: dict[str, Any] = {}

    def walk(name: str, part: Any) -> None:
        if isinstance(part, dict):
            for key, value in part.items():
                walk(f"{name}[{key!r}]", value)
        elif isinstance(part, list | tuple):
            for number, value in enumerate(part):
                walk(f"{name}[{number}]", value)
        elif part is not None:
            named[name] = part

    parts = keras.utils.unpack_x_y_sample_weight(batch)
    for name, part in zip(("x", "y", "sample_weight"), parts, strict=True):
        walk(name, part)
    return named
