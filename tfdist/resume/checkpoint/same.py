"""What must be the same in a training that goes on."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

from tfdist import data
from tfdist.data.arrays import Arrays
from tfdist.errors import ArgumentError
from tfdist.samplers import Sampler

_CONTENTS = "contents"  # may differ: a loader may compute its last bits anew


def describe(
    model: Any,
    variables: Sequence[Any],
    source: data.Source,
    sampler: Sampler,
    seed: int | None,
    of_extensions: dict[str, Any],
    *,
    names_contents: bool,
) -> dict[str, Any]:
    """Describes a training by what must be the same when it goes on.

    Args:
        model: A compiled `keras.Model`.
        variables: Its state.
        source: The data.
        sampler: Which rows make up each step.
        seed: The sampler's, or None if it is secret.
        of_extensions: What extensions must not change, by their names.
        names_contents: Whether a fingerprint of the data may be written down.

    Returns:
        Plain data by name.
    """
    inner = source.drawn_from
    setup = {
        "batch_size": getattr(inner, "batch_size", None),
        "seed": seed,
        "steps_per_epoch": source.steps,
        "data": source.spec_text(),
        "sampler": type(sampler).__name__,
        "optimizer": type(model.optimizer).__name__,
        "variables": [[v.path, [int(n) for n in v.shape], str(v.dtype)] for v in variables],
        **of_extensions,
    }
    if isinstance(inner, Arrays):
        setup["rows"] = inner.num_rows
    if type(inner) is Arrays and seed is not None:
        setup["order of rows"] = hashlib.sha256(inner.first_rows()).hexdigest()[:12]
    if type(inner) is Arrays and names_contents:
        setup[_CONTENTS] = hashlib.sha256(inner.contents()).hexdigest()[:12]
    return setup


def has_other_contents(now: dict[str, Any], saved: dict[str, Any]) -> bool:
    """Tells whether training goes on with arrays of other values, as far as is known.

    Args:
        now: What `describe` gives.
        saved: What it gave.
    """
    found = {setup.get(_CONTENTS) for setup in (now, saved)} - {None}
    return len(found) > 1


def compare(now: dict[str, Any], saved: dict[str, Any], folder: str) -> None:
    """Refuses a checkpoint of another training.

    Args:
        now: What `describe` gives.
        saved: What it gave.
        folder: Of the checkpoint.

    Raises:
        ArgumentError: Something differs; it is named.
    """
    remedy = "Train as then, or pass another directory."
    for name in {**now, **saved}:
        ours, theirs = now.get(name), saved.get(name)
        if name not in ("variables", _CONTENTS) and ours != theirs:
            ours, theirs = _differing(ours, theirs)
            raise ArgumentError(
                f"A checkpoint must be of the same training. Received: {name}={ours!r}, and "
                f"{theirs!r} in {folder}. {remedy}"
            )
    for ours, theirs in itertools.zip_longest(now["variables"], saved["variables"]):
        # Paths have numbers of models that a process made before.
        if ours is None or theirs is None or ours[1:] != theirs[1:]:
            raise ArgumentError(
                "A checkpoint must be of the same model, optimizer and metrics. Received: "
                f"{_described(ours)}, and {_described(theirs)} in {folder}. {remedy}"
            )


def _differing(ours: Any, theirs: Any) -> tuple[Any, Any]:
    """Leaves of two descriptions what differs; of data that it does."""
    if not (isinstance(ours, dict) and isinstance(theirs, dict)):
        return ours, theirs
    names = [n for n in {**ours, **theirs} if ours.get(n) != theirs.get(n)]
    said = {"values": ("these values of the data", "others")}
    pairs = {n: said.get(n, (ours.get(n), theirs.get(n))) for n in names}
    return {n: p[0] for n, p in pairs.items()}, {n: p[1] for n, p in pairs.items()}


def _described(variable: Any) -> str:
    if variable is None:
        return "no more variables"
    path, shape, dtype = variable
    return f"variable {path} of shape {tuple(shape)} and {dtype}"
