"""What of `fit`'s arguments private training cannot use, with the reason and the remedy."""

from __future__ import annotations

import collections
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist import data
from tfdist.errors import ArgumentError
from tfdist.imbalance.per_class import PerClassMetrics
from tfdist.privacy import leaking_callbacks
from tfdist.privacy.dpftrl import DPFTRL
from tfdist.privacy.sampling.poisson import Accounted, Poisson
from tfdist.privacy.settings import DPSGD
from tfdist.strategies.session import Session

_ROWS_SOUGHT = 200


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
    if session.strategy.elastic and (privacy.is_scheduled or privacy.bands is not None):
        raise ArgumentError(
            "Steps must be alike in an elastic run: who joins does not know their number, nor "
            "the noise before. Received: a schedule, or `bands`. Use a fixed number of "
            "processes."
        )
    if not session.strategy.sums_exactly:
        raise ArgumentError(
            "Private gradients must be summed as they are: noise is added before. Received: "
            f"strategy {session.strategy.name!r} with compression or Adasum. Use "
            "tfdist.Horovod() without them."
        )


def _check_sampler(sampler: Any, privacy: DPSGD) -> None:
    if privacy.bands is not None:
        raise ArgumentError(
            "`sampler` must be None with `bands`: groups of examples take turns, or less is "
            f"protected than epsilon says. Received: a {type(sampler).__name__}. Leave one of "
            "them out."
        )
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
    leaking_callbacks.check_callbacks([c for c in listed if c is not None])
    for callback in listed:
        if isinstance(callback, PerClassMetrics) and _overlap(callback.x, x):
            raise ArgumentError(
                "PerClassMetrics must not be of the training data in private training: it "
                "counts single examples, without noise. Received: the arrays of `x`. Give it "
                "data that need not be protected."
            )


def check_validation(
    callbacks: Any, x: Any, validation_data: Any, validation_split: float
) -> bool:
    """Refuses decisions by validation on the data that are protected.

    What is evaluated is neither clipped nor hidden. Whether other data are like them cannot be
    seen, nor whether `fit` is called again by what validation found, as tuners do.

    Args:
        callbacks: What `fit` was given.
        x: What `fit` was given.
        validation_data: What `fit` was given.
        validation_split: What `fit` was given.

    Returns:
        Whether validation is on such data.

    Raises:
        ArgumentError: A callback decides by it.
    """
    given = "validation_split"
    if validation_data is not None:
        of_validation = keras.utils.unpack_x_y_sample_weight(validation_data)[0]
        given = "validation_data with rows of `x`"
        looked_at = _rows_at_first(of_validation), _rows_at_first(x)
        if not (_overlap(of_validation, x) or are_rows_of(*looked_at)):
            return False
    elif not validation_split:
        return False
    listed = getattr(callbacks, "callbacks", callbacks)
    for callback in listed if isinstance(listed, list | tuple) else [listed]:
        if leaking_callbacks.decides_by_validation(callback):
            raise ArgumentError(
                "What private training does must not depend on validation on the data that are "
                f"protected, which has no noise. Received: {given}, and "
                f"{type(callback).__name__} with monitor={callback.monitor!r}. Pass "
                "validation_data that need not be protected, or leave the callback out."
            )
    return True


def _rows_at_first(x: Any) -> Any:
    """Gives arrays, or the inputs of a stream's first batch; None if it has none."""
    if isinstance(x, tf.data.Dataset):
        batch = next(iter(x), None)
    elif isinstance(x, keras.utils.PyDataset):
        batch = x[0]
    else:
        return x
    inputs = None if batch is None else keras.utils.unpack_x_y_sample_weight(batch)[0]
    if any(map(data.is_composite, tf.nest.flatten(inputs))):
        return None
    return tf.nest.map_structure(np.asarray, inputs)


def are_rows_of(some: Any, x: Any) -> bool:
    """Tells whether at least half of some rows are found in arrays.

    Rows that come several times there do not count: of few values, any may be there by chance.
    Some 200 of them are looked for.

    Args:
        some: Arrays of rows, nested as `x`.
        x: Arrays, else there is nothing to be found.
    """
    if some is None or x is None or not (data.is_arrays(some) and data.is_arrays(x)):
        return False
    leaves = [*tf.nest.flatten(some), *tf.nest.flatten(x)]
    half = len(tf.nest.flatten(x))
    if len(leaves) != 2 * half or any(map(data.is_composite, leaves)):
        return False
    arrays = [np.asarray(leaf) for leaf in leaves]
    wanted, held = arrays[:half], arrays[half:]
    if any(array.dtype == object or not array.ndim for array in arrays) or not len(wanted[0]):
        return False
    if any(w.shape[1:] != h.shape[1:] for w, h in zip(wanted, held, strict=True)):
        return False
    chosen = np.unique(np.linspace(0, len(wanted[0]) - 1, _ROWS_SOUGHT).astype(int))
    wanted = [w[chosen].astype(h.dtype) for w, h in zip(wanted, held, strict=True)]
    sought = {_bytes(wanted, row) for row in range(len(chosen))}
    counts = collections.Counter(_bytes(held, row) for row in _candidates(wanted[0], held[0]))
    return sum(counts[row] == 1 for row in sought) >= max(1, len(sought) / 2)


def _bytes(arrays: list[Any], row: int) -> bytes:
    return b"".join(np.asarray(array[row]).tobytes() for array in arrays)


def _candidates(wanted: Any, held: Any) -> Any:
    """Gives the rows that may be among some, by a few of their columns, which is quick."""
    wanted, held = wanted.reshape(len(wanted), -1), held.reshape(len(held), -1)
    columns = np.unique(np.linspace(0, wanted.shape[1] - 1, 64).astype(int))
    telling = sorted(columns, key=lambda c: -len(np.unique(wanted[:, c])))[:3]
    fits = np.ones(len(held), bool)
    for column in telling:
        fits &= np.isin(held[:, column], wanted[:, column])
    return np.flatnonzero(fits)


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
