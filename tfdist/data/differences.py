"""What differs between data that workers should have alike, when something does."""

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
    """Finds out what differs; every worker calls it, and gets the same.

    Args:
        source: The data.
        strategy: Where the workers are.

    Returns:
        What was received, to be put into a message; None if it is not seen.
    """
    held = source.held
    named = _named(source.spec() if held is None else held)
    shapes = {name: f"{tuple(leaf.shape)} {leaf.dtype.name}" for name, leaf in named.items()}
    everyone = strategy.gather_objects(shapes)
    for name in dict.fromkeys(itertools.chain(*everyone)):
        found = [shapes.get(name, "none") for shapes in everyone]
        if len(set(found)) > 1:
            listed = "; ".join(f"worker {i}: {shape}" for i, shape in enumerate(found))
            return f"another shape or type of {name}: {listed}"
    if held is None:
        return None
    digests = {name: _digests(leaf, 0, int(leaf.shape[0])) for name, leaf in named.items()}
    everyone = strategy.gather_objects(digests)
    differing = [name for name in named if any(d[name] != everyone[0][name] for d in everyone)]
    if not differing:
        return None
    first, *others = differing
    row, workers = _first_row(named[first], strategy)
    others = [f"{name} differs too" for name in others]
    return "; ".join(
        [
            f"other values of {first}, of shape {tuple(named[first].shape)}: row {row} is the "
            f"first that worker {', '.join(map(str, workers))} has unlike worker 0",
            *others,
        ]
    )


def _first_row(column: Any, strategy: Strategy) -> tuple[int, list[int]]:
    """Finds the first row that differs, and the workers that have another than worker 0."""
    begin, end = 0, int(column.shape[0])
    while True:
        everyone = strategy.gather_objects(_digests(column, begin, end))
        by_block = list(zip(*everyone, strict=True))
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


def _named(batch: Any) -> dict[str, Any]:
    """Names the leaves of a batch as the arguments of `fit` that they come from."""
    found: dict[str, Any] = {}

    def walk(name: str, part: Any) -> None:
        if isinstance(part, dict):
            for key, value in part.items():
                walk(f"{name}[{key!r}]", value)
        elif isinstance(part, list | tuple):
            for number, value in enumerate(part):
                walk(f"{name}[{number}]", value)
        elif part is not None:
            found[name] = part

    parts = keras.utils.unpack_x_y_sample_weight(batch)
    for name, part in zip(("x", "y", "sample_weight"), parts, strict=True):
        walk(name, part)
    return found
