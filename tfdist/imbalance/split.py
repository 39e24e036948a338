"""Splits that keep the classes' shares."""

from __future__ import annotations

import fractions
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from tfdist.data.columns import count_rows
from tfdist.errors import ArgumentError, MissingPackageError
from tfdist.samplers.classes import group_rows

_MOST_FOLDS = 20


def stratified_split(
    x: Any,
    y: Any,
    sample_weight: Any = None,
    *,
    fraction: float = 0.2,
    labels: Any = None,
    groups: Any = None,
    seed: int = 0,
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Splits arrays in two, each class in the same proportion.

    Args:
        x: Arrays of shape [rows, ...] (NumPy, TensorFlow, pandas), nested in dicts, lists or
            tuples.
        y: Targets, likewise.
        sample_weight: Weights, likewise, or None.
        fraction: The part of the rows that the second one gets, between 0 and 1.
        labels: Each row's class, as samplers take them; `y` if None. Each combination of
            several labels is a class.
        groups: Array of shape [rows]; rows of one group (a patient, a site) stay together.
            The parts are then as nearly as groups allow of the sizes and shares asked for.
        seed: Another seed splits otherwise. The same on every worker, or they train on
            other rows.

    Returns:
        `(x, y)` to train on and `(x, y)` to validate on, with `sample_weight` as the third
        if it was given; rows in the order of the data, nesting and types kept. The row of a
        class that has but one is in the first. Made by scikit-learn's
        `StratifiedShuffleSplit`, or `StratifiedGroupKFold` if there are groups.

    Raises:
        ArgumentError: Lengths differ, the labels are not classes, or there are too few rows
            or groups for such a split.
        MissingPackageError: scikit-learn is not installed.

    Example:
        >>> import numpy as np
        >>> from tfdist.imbalance import stratified_split
        >>> y = np.array([0] * 90 + [1] * 10)
        >>> (x_train, y_train), (x_test, y_test) = stratified_split(np.arange(100), y)
        >>> np.bincount(y_test).tolist()
        [18, 2]
    """
    if not 0 < fraction < 1:
        raise ArgumentError(
            f"`fraction` must be between 0 and 1. Received: fraction={fraction!r}."
        )
    given = {"x": x, "y": y, "sample_weight": sample_weight, "labels": labels}
    rows = count_rows(**given, groups=groups)
    classes = group_rows(y if labels is None else labels, "y", combinations=True)
    codes = np.empty(rows, np.int64)
    codes[classes.members] = np.repeat(np.arange(len(classes.counts)), classes.counts)
    try:
        if groups is None:
            second = _by_rows(codes, classes.counts, fraction, seed)
        else:
            second = _by_groups(codes, np.asarray(groups), fraction, seed)
    except ImportError:
        raise MissingPackageError(
            "`stratified_split` needs scikit-learn. Received: an installation without it. "
            "Install it: pip install scikit-learn."
        ) from None
    chosen = np.zeros(rows, bool)
    chosen[second] = True
    columns = [x, y] if sample_weight is None else [x, y, sample_weight]
    first, last = (
        tuple(tf.nest.map_structure(lambda leaf, r=part: _take(leaf, r), c) for c in columns)
        for part in (np.flatnonzero(~chosen), np.flatnonzero(chosen))
    )
    return first, last


def _by_rows(
    codes: NDArray[np.int64], counts: NDArray[np.int64], fraction: float, seed: int
) -> NDArray[Any]:
    from sklearn.model_selection import StratifiedShuffleSplit

    divisible = np.flatnonzero(counts[codes] > 1)
    splitter = StratifiedShuffleSplit(n_splits=1, test_size=fraction, random_state=seed)
    try:
        ((_, second),) = splitter.split(divisible, codes[divisible])
    except ValueError as reason:
        raise ArgumentError(
            "Each part must have at least a row of each class. Received: "
            f"fraction={fraction} of {len(codes)} rows in {len(counts)} classes "
            f"({reason}) Take another fraction, or join rare classes in `labels`."
        ) from None
    found: NDArray[Any] = divisible[second]
    return found


def _by_groups(
    codes: NDArray[np.int64], groups: NDArray[Any], fraction: float, seed: int
) -> NDArray[Any]:
    from sklearn.model_selection import StratifiedGroupKFold

    part = fractions.Fraction(fraction).limit_denominator(_MOST_FOLDS)
    part = min(max(part, fractions.Fraction(1, _MOST_FOLDS)), 1 - fractions.Fraction(1, 20))
    folds, number = part.denominator, len(np.unique(groups))
    if number < folds:
        raise ArgumentError(
            f"There must be at least {folds} groups for a part of {fraction}. Received: "
            f"{number} groups. Take another fraction, or smaller groups."
        )
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    try:
        parts = [second for _, second in splitter.split(codes, codes, groups)]
    except ValueError as reason:
        raise ArgumentError(
            f"A class must have at least {folds} rows for a part of {fraction}. Received: "
            f"{len(codes)} rows in {codes.max() + 1} classes ({reason})."
        ) from None
    found = np.concatenate(parts[: part.numerator])
    if not 0 < len(found) < len(codes):
        raise ArgumentError(
            "Each part must have at least a group. Received: groups so unequal in size that "
            f"one part of {fraction} has {len(found)} of {len(codes)} rows."
        )
    return found


def _take(leaf: Any, rows: NDArray[Any]) -> Any:
    if tf.is_tensor(leaf):
        return tf.gather(leaf, rows)
    return leaf.iloc[rows] if hasattr(leaf, "iloc") else np.asarray(leaf)[rows]
