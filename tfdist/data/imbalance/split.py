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
    """Splits arrays into two parts that both have the class shares of the data.

    The split is made by scikit-learn's `StratifiedShuffleSplit`, or by its
    `StratifiedGroupKFold` if there are groups.

    Args:
        x: Arrays of shape [rows, ...] (NumPy, TensorFlow, pandas), nested in dicts, lists or
            tuples.
        y: Targets of the same kind.
        sample_weight: Weights of the same kind, or None.
        fraction: The share of the rows in the second part, between 0 and 1.
        labels: The class of each row, as in samplers; `y` if None. Each combination of
            several labels is a class.
        groups: Array of shape [rows], or None. Rows of one group (a patient, a site) stay in
            the same part. Then sizes and class shares are only as exact as the groups allow.
        seed: Chooses the split. Use the same seed on every worker: otherwise the workers train
            on different rows.

    Returns:
        `(x, y)` for training and `(x, y)` for validation, or `(x, y, sample_weight)` if weights
        are given. Rows keep their order, and arrays keep their nesting and types. The only row
        of a class is in the first part.

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
    columns_by_name = {"x": x, "y": y, "sample_weight": sample_weight, "labels": labels}
    rows = count_rows(**columns_by_name, groups=groups)
    classes = group_rows(y if labels is None else labels, "y", combinations=True)
    codes = np.empty(rows, np.int64)
    codes[classes.members] = np.repeat(np.arange(len(classes.counts)), classes.counts)
    try:
        if groups is None:
            validation_rows = _by_rows(codes, classes.counts, fraction, seed)
        else:
            validation_rows = _by_groups(codes, np.asarray(groups), fraction, seed)
    except ImportError:
        raise MissingPackageError(
            "`stratified_split` needs scikit-learn. Received: an installation without it. "
            "Install it: pip install scikit-learn."
        ) from None
    is_validation = np.zeros(rows, bool)
    is_validation[validation_rows] = True
    columns = [x, y] if sample_weight is None else [x, y, sample_weight]
    training_part, validation_part = (
        tuple(tf.nest.map_structure(lambda leaf, r=part: _take(leaf, r), c) for c in columns)
        for part in (np.flatnonzero(~is_validation), np.flatnonzero(is_validation))
    )
    return training_part, validation_part


def _by_rows(
    codes: NDArray[np.int64], counts: NDArray[np.int64], fraction: float, seed: int
) -> NDArray[Any]:
    from sklearn.model_selection import StratifiedShuffleSplit

    divisible = np.flatnonzero(counts[codes] > 1)
    splitter = StratifiedShuffleSplit(n_splits=1, test_size=fraction, random_state=seed)
    try:
        ((_, positions),) = splitter.split(divisible, codes[divisible])
    except ValueError as reason:
        raise ArgumentError(
            "Each part must have at least a row of each class. Received: "
            f"fraction={fraction} of {len(codes)} rows in {len(counts)} classes "
            f"({reason}) Take another fraction, or join rare classes in `labels`."
        ) from None
    validation_rows: NDArray[Any] = divisible[positions]
    return validation_rows


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
        parts = [rows for _, rows in splitter.split(codes, codes, groups)]
    except ValueError as reason:
        raise ArgumentError(
            f"A class must have at least {folds} rows for a part of {fraction}. Received: "
            f"{len(codes)} rows in {codes.max() + 1} classes ({reason})."
        ) from None
    validation_rows = np.concatenate(parts[: part.numerator])
    if not 0 < len(validation_rows) < len(codes):
        raise ArgumentError(
            "Each part must have at least a group. Received: groups so unequal in size that "
            f"one part of {fraction} has {len(validation_rows)} of {len(codes)} rows."
        )
    return validation_rows


def _take(leaf: Any, rows: NDArray[Any]) -> Any:
    if tf.is_tensor(leaf):
        return tf.gather(leaf, rows)
    return leaf.iloc[rows] if hasattr(leaf, "iloc") else np.asarray(leaf)[rows]
