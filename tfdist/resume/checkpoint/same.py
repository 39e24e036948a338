"""Checks that a continued training has the same model, data and settings."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

from tfdist import data
from tfdist.data.arrays import Arrays
from tfdist.errors import ArgumentError
from tfdist.samplers import Sampler

_CONTENTS = "contents"  # may differ in the last bits, as a loader may compute them


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
    """Describes everything that must not change when a training continues.

    Args:
        model: A compiled `keras.Model`.
        variables: The model's state.
        source: The data.
        sampler: The sampler.
        seed: The sampler's seed, or None if it is secret.
        of_extensions: The settings of the extensions, by their names.
        names_contents: Whether a fingerprint of the data may be saved.

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
    # The class of a sampler does not say in which order it draws. Its first rows do.
    if type(inner) is Arrays and seed is not None:
        setup["order of rows"] = hashlib.sha256(inner.first_rows()).hexdigest()[:12]
    if type(inner) is Arrays and names_contents:
        setup[_CONTENTS] = hashlib.sha256(inner.contents()).hexdigest()[:12]
    return setup


def has_other_contents(now: dict[str, Any], saved: dict[str, Any]) -> bool:
    """Returns whether the values of the arrays have changed, if both fingerprints are known.

    Args:
        now: The result of `describe`.
        saved: The result of `describe` in the checkpoint.
    """
    fingerprints = {setup.get(_CONTENTS) for setup in (now, saved)} - {None}
    return len(fingerprints) > 1


def compare(now: dict[str, Any], saved: dict[str, Any], folder: str) -> None:
    """Checks that a checkpoint is of the same training.

    Args:
        now: The result of `describe`.
        saved: The result of `describe` in the checkpoint.
        folder: The checkpoint's folder.

    Raises:
        ArgumentError: Something differs. The message names it.
    """
    remedy = "Train as then, or pass another directory."
    for name in {**now, **saved}:
        current, former = now.get(name), saved.get(name)
        if name not in ("variables", _CONTENTS) and current != former:
            current, former = _differences(current, former)
            raise ArgumentError(
                f"A checkpoint must be of the same training. Received: {name}={current!r}, and "
                f"{former!r} in {folder}. {remedy}"
            )
    for current, former in itertools.zip_longest(now["variables"], saved["variables"]):
        # Paths are not compared: they have numbers, which depend on the models that a process
        # has made before.
        if current is None or former is None or current[1:] != former[1:]:
            raise ArgumentError(
                "A checkpoint must be of the same model, optimizer and metrics. Received: "
                f"{_describe_variable(current)}, and {_describe_variable(former)} in {folder}. "
                f"{remedy}"
            )


def _differences(current: Any, former: Any) -> tuple[Any, Any]:
    """Reduces two dicts to the entries that differ. Fingerprints of data become words."""
    if not (isinstance(current, dict) and isinstance(former, dict)):
        return current, former
    names = [n for n in {**current, **former} if current.get(n) != former.get(n)]
    words = {"values": ("these values of the data", "others")}
    pairs = {n: words.get(n, (current.get(n), former.get(n))) for n in names}
    return {n: p[0] for n, p in pairs.items()}, {n: p[1] for n, p in pairs.items()}


def _describe_variable(variable: Any) -> str:
    if variable is None:
        return "no more variables"
    path, shape, dtype = variable
    return f"variable {path} of shape {tuple(shape)} and {dtype}"
