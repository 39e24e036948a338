"""Class weights: given by the user, or computed from how often each class comes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from tfdist.data import leaves
from tfdist.data.source import shortened
from tfdist.errors import ArgumentError

Weigh = Callable[..., Any]


@dataclass(frozen=True)
class EffectiveNumber:
    """Weighs a class by the inverse of its effective number of examples.

    n examples count as (1 - beta^n) / (1 - beta), because examples overlap. Weights are
    scaled to add up to the number of classes (Cui et al., "Class-balanced loss based on
    effective number of samples", CVPR 2019, sections 3 and 4). With beta 0 all classes weigh
    1. With beta near 1, the weights have the same ratios as with "balanced".

    Args:
        beta: From 0 on, below 1. The paper tries 0.9, 0.99, 0.999 and 0.9999.

    Raises:
        ArgumentError: `beta` is not in that range.

    Example:
        >>> from tfdist.imbalance import EffectiveNumber
        >>> EffectiveNumber(0.9).of([1, 1000])
        [1.0, 10.0]
    """

    beta: float = 0.999

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1:
            raise ArgumentError(
                f"`beta` must be from 0 on and below 1. Received: beta={self.beta!r}."
            )

    def of(self, counts: Any) -> list[float]:
        """Returns the effective number of each class.

        Args:
            counts: Examples of each class, at least 1.
        """
        if self.beta == 0:
            return [1.0 for _ in counts]
        # `expm1` keeps the digits that 1 - beta**n loses for a beta near 1. The result is
        # rounded, because the quotient of an n of 1 may miss 1 by a last bit.
        logarithm = math.log(self.beta)
        return [round(-math.expm1(int(n) * logarithm) / (1.0 - self.beta), 9) for n in counts]


def class_weights(labels: Any, rule: Any = "balanced") -> dict[int, float]:
    """Computes class weights from how often each class comes.

    Args:
        labels: Class numbers, array of shape [examples] or [examples, 1], or one-hot of
            shape [examples, classes].
        rule: "balanced", where class c weighs examples / (classes * examples of c), as in
            scikit-learn; "effective", which is `EffectiveNumber()`; or an
            `EffectiveNumber`.

    Returns:
        The weights by class number, for the classes that occur.

    Raises:
        ArgumentError: The labels are not classes, or the rule is unknown.

    Example:
        >>> import numpy as np
        >>> from tfdist.imbalance import class_weights
        >>> class_weights(np.array([0, 0, 0, 1]))
        {0: 0.6666666666666666, 1: 2.0}
    """
    return _by_rule(check(rule), _count([tf.convert_to_tensor(np.asarray(labels))]))


def check(class_weight: Any) -> Any:
    """Checks the `class_weight` argument.

    Args:
        class_weight: Weights by class number, or a rule as in `class_weights`.

    Returns:
        A dict, "balanced", or an `EffectiveNumber`.

    Raises:
        ArgumentError: It is none of these, or a weight is negative or not finite.
    """
    if isinstance(class_weight, dict):
        for label, weight in class_weight.items():
            if not isinstance(label, int | np.integer) or label < 0:
                raise ArgumentError(
                    "`class_weight` must be by class number, from 0 on. Received: "
                    f"class_weight={{{label!r}: {weight!r}, ...}}."
                )
            if not (math.isfinite(weight) and weight >= 0):
                raise ArgumentError(
                    "`class_weight` must hold numbers from 0 on. Received: "
                    f"class_weight={{{label!r}: {weight!r}, ...}}."
                )
        return class_weight
    if class_weight == "effective":
        return EffectiveNumber()
    if class_weight == "balanced" or isinstance(class_weight, EffectiveNumber):
        return class_weight
    raise ArgumentError(
        '`class_weight` must be a dict, "balanced", "effective" or an EffectiveNumber. '
        f"Received: class_weight={shortened(class_weight)}."
    )


def weigher(
    class_weight: Any, targets: Callable[[], Iterable[Any]], *, must_occur: bool
) -> Weigh:
    """Makes a function that adds class weights to `(x, y)`.

    Args:
        class_weight: As in `check`.
        targets: Yields all targets once, in batches; called only if they must be counted.
        must_occur: Whether to refuse a dict with classes that never occur.

    Returns:
        A function from the parts of a batch to `(x, y, weights)`.

    Raises:
        ArgumentError: The targets are not classes, or a class never occurs.
    """
    weights = check(class_weight)
    if not isinstance(weights, dict):
        weights = _by_rule(weights, _count(targets()))
    elif must_occur:
        counts = np.concatenate([_count(targets(), whole=False), np.zeros(max(weights) + 1)])
        absent = [int(label) for label in weights if not counts[label]]
        if absent:
            raise ArgumentError(
                "Each class of `class_weight` must occur in `y`. Received: weights for "
                f"classes {absent}, which never do. Leave them out."
            )
    table = np.ones(max(weights, default=0) + 1, np.float32)
    for label, weight in weights.items():
        table[int(label)] = weight

    def weigh(*batch: Any) -> Any:
        x, y = x_and_y(batch)
        labels = class_numbers(y)
        # A class without a weight in the dict weighs 1, as in Keras.
        inside = tf.clip_by_value(labels, 0, len(table) - 1)
        return x, y, tf.where(labels == inside, tf.gather(table, inside), 1.0)

    return weigh


def x_and_y(batch: Any) -> tuple[Any, Any]:
    """Splits a batch that is to get class weights.

    Args:
        batch: Its parts.

    Raises:
        ArgumentError: The batch has no targets, several targets, or sample weights.
    """
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(
        batch[0] if len(batch) == 1 else batch
    )
    if sample_weight is not None or y is None or tf.nest.is_nested(y) or leaves.is_composite(y):
        raise ArgumentError(
            "`class_weight` needs one target for each example, dense, and no sample weights. "
            f"Received: y={shortened(y)}, sample_weight={shortened(sample_weight)}."
        )
    return x, y


def class_numbers(y: Any) -> Any:
    """Returns the class numbers of targets, as Keras reads them.

    Args:
        y: Targets of shape [examples], [examples, 1] or [examples, classes].
    """
    if y.shape.rank >= 2 and y.shape[-1] != 1:
        return tf.argmax(y, -1, tf.int32)
    labels = tf.squeeze(y, -1) if y.shape.rank >= 2 else y
    return tf.cast(labels if labels.dtype.is_integer else tf.round(labels), tf.int32)


def _count(targets: Iterable[Any], whole: bool = True) -> NDArray[np.int64]:
    """Counts the examples of each class; if `whole`, refuses values that Keras would round."""
    counts = np.zeros(0, np.int64)
    for y in targets:
        labels = class_numbers(y).numpy()
        if (whole and not are_classes(y)) or labels.min(initial=0) < 0:
            raise ArgumentError(
                "`class_weight` needs targets that are class numbers from 0 on, or one-hot. "
                f"Received: y={shortened(np.asarray(y))}."
            )
        class_counts = np.bincount(labels.ravel(), minlength=len(counts))
        # `minlength` made the new counts at least as long as the old ones.
        class_counts[: len(counts)] += counts
        counts = class_counts
    return counts


def are_classes(y: Any) -> bool:
    """Returns whether targets are whole numbers, or one-hot.

    Args:
        y: As in `class_numbers`.
    """
    values = np.asarray(y)
    if values.ndim >= 2 and values.shape[-1] != 1:
        return bool(((values == 0) | (values == 1)).all() and (values.sum(-1) == 1).all())
    return bool((values == np.rint(values)).all()) if values.dtype.kind == "f" else True


def _by_rule(rule: Any, counts: NDArray[np.int64]) -> dict[int, float]:
    if isinstance(rule, dict):
        raise ArgumentError(f"`rule` must not be a dict. Received: rule={rule!r}.")
    present = np.flatnonzero(counts)
    class_counts = counts[present]
    if isinstance(rule, EffectiveNumber):
        inverse = 1.0 / np.array(rule.of(class_counts))
        weights = inverse * (len(class_counts) / inverse.sum())
    else:
        weights = class_counts.sum() / (len(class_counts) * class_counts)
    return dict(zip(present.tolist(), weights.tolist(), strict=True))
