"""Groups rows by class: the samplers need to know no more of the targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfdist.errors import ArgumentError

Whole = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Classes:
    """The rows of each class that occurs.

    Attributes:
        names: Each class's name in the labels: a value, a column number, or None for the rows
            without any label in multi-label targets.
        counts: int64 array, rows of each class.
        offsets: int64 array, the beginning of each class in `members`.
        members: Row numbers, class after class, in the order of the data within a class.
        num_rows: Rows of the data; fewer than `members` if rows have several labels.
    """

    names: list[Any]
    counts: Whole
    offsets: Whole
    members: NDArray[Any]
    num_rows: int

    @property
    def several(self) -> bool:
        """Whether some rows are in several classes."""
        return len(self.members) > self.num_rows


def count_classes(labels: Any, name: str = "labels") -> tuple[list[Any], Whole]:
    """Counts the rows of each class.

    Args:
        labels: As in `group_rows`.
        name: The argument's name, for messages.

    Returns:
        The classes that occur, in ascending order, and the rows of each.

    Raises:
        ArgumentError: As in `group_rows`.
    """
    array = _as_labels(labels, name)
    if array.ndim == 1:
        names, codes = _encode(array, name)
        return names, np.bincount(codes, minlength=len(names)).astype(np.int64)
    columns = array.sum(0, dtype=np.int64)
    unlabelled = int((array.sum(1, dtype=np.int64) == 0).sum())
    names = [int(column) for column in np.flatnonzero(columns)]
    counts = columns[columns > 0]
    if unlabelled:
        return [*names, None], np.append(counts, unlabelled)
    return names, counts


def group_rows(labels: Any, name: str = "labels", combinations: bool = False) -> Classes:
    """Groups row numbers by class.

    Args:
        labels: An array of shape [rows] or [rows, 1] of whole numbers, booleans or text;
            or of shape [rows, classes] of zeros and ones, one-hot or with several labels.
        name: The argument's name, for messages.
        combinations: Whether each combination of labels is a class. Otherwise a row with
            several labels belongs to several classes.

    Raises:
        ArgumentError: The labels are of another kind, or there are no labels.
    """
    array = _as_labels(labels, name)
    rows = len(array)
    small = np.int32 if rows <= np.iinfo(np.int32).max else np.int64
    sums = array.sum(1, dtype=np.int64) if array.ndim == 2 else None
    if sums is None or combinations or (sums == 1).all():
        if sums is None:
            names, codes = _encode(array, name)
        elif combinations:
            names, codes = _encode_combinations(array)
        else:
            names, codes = _encode(array.argmax(1), name)
        counts = np.bincount(codes, minlength=len(names)).astype(np.int64)
        members = np.argsort(codes, kind="stable").astype(small)
    else:
        names = [int(column) for column in np.flatnonzero(array.any(0))]
        grouped = [np.flatnonzero(array[:, column]).astype(small) for column in names]
        unlabelled = np.flatnonzero(sums == 0).astype(small)
        if len(unlabelled):
            names, grouped = [*names, None], [*grouped, unlabelled]
        counts = np.array([len(group) for group in grouped], np.int64)
        members = np.concatenate(grouped)
    return Classes(names, counts, np.cumsum(counts) - counts, members, rows)


def _as_labels(labels: Any, name: str) -> NDArray[Any]:
    """Makes an array of shape [rows], or [rows, classes] of zeros and ones."""
    if isinstance(labels, dict | tuple):
        raise ArgumentError(
            f"`{name}` must be one array to draw by class. Received: {name} of type "
            f"{type(labels).__name__}. Pass the classes to the sampler: labels=..."
        )
    array = np.asarray(labels)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim not in (1, 2) or array.size == 0:
        raise ArgumentError(
            f"`{name}` must have shape [rows] or [rows, classes] and at least one row. "
            f"Received: {name} with shape {array.shape}."
        )
    if array.ndim == 2:
        if array.dtype.kind not in "buif" or not ((array == 0) | (array == 1)).all():
            raise ArgumentError(
                f"`{name}` of shape [rows, classes] must hold zeros and ones only. Received: "
                f"{name} with shape {array.shape} and other values. Pass class numbers."
            )
        hot: NDArray[np.bool_] = array != 0
        return hot
    if array.dtype.kind == "f":
        if not (np.isfinite(array) & (array == np.rint(array))).all():
            raise ArgumentError(
                f"`{name}` must be classes: whole numbers. Received: {name} with fractions, "
                "NaN or infinity. Pass the classes to the sampler: labels=..."
            )
        array = array.astype(np.int64)
    return array


def _encode(labels: NDArray[Any], name: str) -> tuple[list[Any], NDArray[Any]]:
    """Numbers the classes from 0 on, in the smallest possible dtype: it sorts faster."""
    if labels.dtype.kind not in "bui":
        try:
            names, codes = np.unique(labels, return_inverse=True)
        except TypeError:
            raise ArgumentError(
                f"`{name}` must be numbers, or text. Received: {name} of mixed types."
            ) from None
        return names.tolist(), codes.astype(np.min_scalar_type(len(names)))
    lowest, highest = int(labels.min()), int(labels.max())
    if highest - lowest >= 2**16:
        names, codes = np.unique(labels, return_inverse=True)
        return names.tolist(), codes.astype(np.min_scalar_type(len(names)))
    codes = labels.astype(np.int64, copy=False)
    codes = (codes - lowest if lowest else codes).astype(np.min_scalar_type(highest - lowest))
    present = np.flatnonzero(np.bincount(codes))
    if len(present) <= highest - lowest:
        number = np.zeros(highest - lowest + 1, np.min_scalar_type(len(present)))
        number[present] = np.arange(len(present))
        codes = number[codes]
    return (present + lowest).tolist(), codes


def _encode_combinations(labels: NDArray[Any]) -> tuple[list[Any], NDArray[Any]]:
    packed = np.ascontiguousarray(np.packbits(labels, axis=1))
    keys = packed.view(np.dtype((np.void, packed.shape[1])))[:, 0]
    _, first, codes = np.unique(keys, return_index=True, return_inverse=True)
    names = [tuple(np.flatnonzero(labels[row]).tolist()) for row in first]
    return names, codes.astype(np.min_scalar_type(len(names)))
