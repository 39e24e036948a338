"""What of `fit`'s arguments private training cannot use, with the reason and the remedy."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist import data
from tfdist.errors import ArgumentError
from tfdist.imbalance.per_class import PerClassMetrics
from tfdist.privacy import watchers
from tfdist.privacy.in_turn import DPFTRL
from tfdist.privacy.poisson import Accounted, Poisson
from tfdist.privacy.settings import DPSGD
from tfdist.session import Session


def check_data(
    session: Session, x: Any, sampler: Any, class_weight: Any, privacy: DPSGD
) -> None:
    """Refuses data, sampling and sums that the accounting is not of.

    Args:
        session: Where the replicas are.
        x: What `fit` was given.
        sampler: What `fit` was given.
        class_weight: What `fit` was given.
        privacy: The settings.

    Raises:
        ArgumentError: It is such.
    """
    if any(map(data.is_composite, tf.nest.flatten(x))):
        raise ArgumentError(
            "`x` must be dense in private training: each example has a gradient of its own. "
            "Received: x with a sparse or ragged leaf. Convert it: tensor.to_tensor(), "
            "matrix.toarray()."
        )
    if isinstance(privacy, DPFTRL):
        _check_data_in_turn(session, x, sampler)
    elif not data.is_arrays(x):
        raise ArgumentError(
            "`x` must be arrays in private training: each example is drawn by itself, which a "
            f"stream of batches cannot do. Received: x of type {type(x).__name__}. Pass "
            "arrays, or privacy=tfdist.DPFTRL(...), which samples nothing."
        )
    elif sampler is not None:
        _check_sampler(sampler, privacy)
    if class_weight is not None and not isinstance(class_weight, dict):
        raise ArgumentError(
            "`class_weight` must be a dict in private training: a rule counts the classes of "
            f"the data, without noise. Received: class_weight={class_weight!r}. Pass "
            "weights that were chosen without these data; they are applied before clipping."
        )
    if not session.strategy.sums_exactly:
        raise ArgumentError(
            "Private gradients must be summed as they are: noise is added before. Received: "
            f"strategy {session.strategy.name!r} with compression or Adasum. Use "
            "tfdist.Horovod() without them."
        )


def _check_sampler(sampler: Any, privacy: DPSGD) -> None:
    if privacy.group_ids is not None and not isinstance(sampler, Poisson):
        raise ArgumentError(
            "`sampler` must be a tfdist.privacy.Poisson with `group_ids`: it draws users, all "
            f"alike. Received: a {type(sampler).__name__}. Leave it out."
        )
    if not isinstance(sampler, Accounted):
        raise ArgumentError(
            "`sampler` must be a tfdist.privacy.Poisson or PoissonLike in private training: "
            f"the accounting is of their sampling. Received: a {type(sampler).__name__}. Leave "
            "it out, or pass tfdist.privacy.PoissonLike(sampler), which draws rows by "
            "themselves, as often on average, and costs what the most frequent one does."
        )


def _check_data_in_turn(session: Session, x: Any, sampler: Any) -> None:
    if session.strategy.elastic:
        raise ArgumentError(
            "DPFTRL must run on processes that stay: noise is taken back by the one that gave "
            "it, which may go. Received: an elastic run. Use tfdist.DPSGD(...), or a fixed "
            "number of processes."
        )
    if sampler is not None:
        raise ArgumentError(
            "`sampler` must be None with DPFTRL, which takes all examples in turn. Received: a "
            f"{type(sampler).__name__}. Use shuffle=False to keep the order of the rows."
        )
    streams = tf.data.Dataset | keras.utils.PyDataset
    if not data.is_arrays(x) and not isinstance(x, streams):
        raise ArgumentError(
            "`x` must be arrays, a tf.data.Dataset or a keras.utils.PyDataset in private "
            f"training. Received: x of type {type(x).__name__}."
        )


def check_copies(privacy: DPSGD, augment: Any) -> None:
    """Refuses several augmentations of which none is made.

    Args:
        privacy: The settings.
        augment: What `fit` was given.

    Raises:
        ArgumentError: It is such.
    """
    if privacy.augmentations > 1 and augment is None:
        raise ArgumentError(
            "`augmentations` must come with an `augment` of `fit`, or all copies are the "
            f"same. Received: augmentations={privacy.augmentations!r} and augment=None."
        )


def check_users(privacy: DPSGD, shard: Any, validation_split: float) -> None:
    """Refuses what would take a user's examples apart.

    Args:
        privacy: The settings.
        shard: What `fit` was given.
        validation_split: What `fit` was given.

    Raises:
        ArgumentError: It is such.
    """
    if privacy.group_ids is None:
        return
    if shard is not None:
        raise ArgumentError(
            "`group_ids` must be of data that all workers pass alike: a user's examples are "
            f"clipped together, on one replica. Received: shard={shard!r}. Leave `shard` out."
        )
    if validation_split:
        raise ArgumentError(
            "`validation_split` must not cut through a user's examples, of which some would be "
            f"trained on. Received: validation_split={validation_split!r} and group_ids. Pass "
            "validation_data of other users."
        )


def check_callbacks(callbacks: Any, x: Any) -> None:
    """Refuses callbacks that decide or show without noise what single examples do.

    Args:
        callbacks: What `fit` was given.
        x: What `fit` was given.

    Raises:
        ArgumentError: There is one.
    """
    given = getattr(callbacks, "callbacks", callbacks)
    listed = given if isinstance(given, list | tuple) else [given]
    watchers.check_callbacks([c for c in listed if c is not None])
    for callback in listed:
        if isinstance(callback, PerClassMetrics) and _overlap(callback.x, x):
            raise ArgumentError(
                "PerClassMetrics must not be of the training data in private training: it "
                "counts single examples, without noise. Received: the arrays of `x`. Give it "
                "data that need not be protected."
            )


def _overlap(first: Any, second: Any) -> bool:
    """Tells whether arrays have memory in common; tensors, whether they are the same."""
    for a in tf.nest.flatten(first):
        for b in tf.nest.flatten(second):
            if a is b:
                return True
            if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
                try:
                    if np.shares_memory(a, b, max_work=1000):  # type: ignore[arg-type]
                        return True
                except np.exceptions.TooHardError:
                    continue
    return False
