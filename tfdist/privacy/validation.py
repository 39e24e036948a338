"""Refuses arguments of `fit` that private training cannot use, with reason and remedy."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from tfdist import _keras, data
from tfdist.errors import ArgumentError
from tfdist.privacy import leaking_callbacks, shared_rows
from tfdist.privacy.dpftrl import DPFTRL
from tfdist.privacy.sampling.poisson import Poisson, draws_as_accounted
from tfdist.privacy.settings import DPSGD
from tfdist.strategies.session import Session
from tfdist.training import callback_kinds


def check_traced(model: Any) -> None:
    """Refuses private training without a graph.

    Only the graph of a step shows what it depends on, and which axes are the batch. Python code
    that runs in each step may remember examples.

    Args:
        model: A compiled `keras.Model`.

    Raises:
        ArgumentError: Steps would not be traced.
    """
    everywhere = tf.config.functions_run_eagerly()
    if model.run_eagerly or everywhere:
        raise ArgumentError(
            "Private steps must be traced: Python code that runs in each step may remember "
            "examples. Received: "
            + ("tf.config.run_functions_eagerly(True)." if everywhere else "run_eagerly=True.")
            + " Turn it off, and look for errors without `privacy`."
        )


def check_data(
    session: Session, x: Any, sampler: Any, class_weight: Any, privacy: DPSGD
) -> None:
    """Refuses data, sampling and sums that the accounting does not cover.

    Args:
        session: The session of `fit`.
        x: As in `fit`.
        sampler: As in `fit`.
        class_weight: As in `fit`.
        privacy: The settings.

    Raises:
        ArgumentError: An argument is not covered.
    """
    if any(map(data.is_composite, tf.nest.flatten(x))):
        raise ArgumentError(
            "`x` must be dense in private training: each example has a gradient of its own. "
            "Received: x with a sparse or ragged leaf. Convert it with tensor.to_tensor() or "
            "matrix.toarray()."
        )
    if isinstance(privacy, DPFTRL):
        _check_data_in_turn(session, x, sampler)
    elif not data.is_arrays(x):
        raise ArgumentError(
            "`x` must be arrays in private training: each example is drawn by itself, which a "
            f"stream of batches cannot do. Received: x of type {type(x).__name__}. Pass "
            "arrays, or privacy=tfdist.DPFTRL(...), which needs no sampling."
        )
    elif sampler is not None:
        _check_sampler(sampler, privacy)
    check_class_weight(class_weight)
    if session.strategy.elastic and (privacy.is_scheduled or privacy.bands is not None):
        raise ArgumentError(
            "All steps must be alike in an elastic run: a process that joins knows neither "
            "their number nor the noise before. Received: a schedule, or `bands`. Use a fixed "
            "number of processes."
        )
    check_sums(session)


def check_class_weight(class_weight: Any) -> None:
    """Refuses weights that are computed from the data.

    Args:
        class_weight: As in `fit`.

    Raises:
        ArgumentError: They are.
    """
    if class_weight is not None and not isinstance(class_weight, dict):
        raise ArgumentError(
            "`class_weight` must be a dict in private training: a rule counts the classes of "
            f"the data, without noise. Received: class_weight={class_weight!r}. Pass "
            "weights that were chosen without these data; they are applied before clipping."
        )


def check_sums(session: Session) -> None:
    """Refuses strategies that change what they sum.

    Args:
        session: The session of `fit`.

    Raises:
        ArgumentError: The strategy is such a one.
    """
    if not session.strategy.sums_exactly:
        raise ArgumentError(
            "Private gradients must be summed as they are: they have noise already. Received: "
            f"strategy={session.strategy.name!r} with compression or Adasum. Use "
            "tfdist.Horovod() without them."
        )


def _check_sampler(sampler: Any, privacy: DPSGD) -> None:
    if privacy.bands is not None:
        raise ArgumentError(
            "`sampler` must be None with `bands`: groups of examples must take turns, or "
            f"epsilon would be too low. Received: sampler of type {type(sampler).__name__} and "
            f"bands={privacy.bands!r}. Leave one of them out."
        )
    is_accounted = draws_as_accounted(sampler)
    if privacy.group_ids is not None and not (is_accounted and isinstance(sampler, Poisson)):
        raise ArgumentError(
            "`sampler` must be a tfdist.privacy.Poisson with `group_ids`: it draws users, all "
            f"alike. Received: sampler of type {type(sampler).__name__}. Leave it out."
        )
    if not is_accounted:
        raise ArgumentError(
            "`sampler` must be a tfdist.privacy.Poisson or PoissonLike in private training: "
            "epsilon is computed for their sampling. Received: sampler of type "
            f"{type(sampler).__name__}. Leave it out, or pass "
            "tfdist.privacy.PoissonLike(sampler), which draws each row independently and as "
            "often on average, and costs what the most frequent row does."
        )


def _check_data_in_turn(session: Session, x: Any, sampler: Any) -> None:
    if session.strategy.elastic:
        raise ArgumentError(
            "DPFTRL must run on a fixed set of processes: each subtracts the noise that it has "
            "added itself. Received: an elastic run. Use tfdist.DPSGD(...), or a fixed number "
            "of processes."
        )
    if sampler is not None:
        raise ArgumentError(
            "`sampler` must be None with DPFTRL, which takes all examples in turn. Received: "
            f"sampler of type {type(sampler).__name__}. Use shuffle=False to keep the order of "
            "the rows."
        )
    streams = tf.data.Dataset | keras.utils.PyDataset
    if not data.is_arrays(x) and not isinstance(x, streams):
        raise ArgumentError(
            "`x` must be arrays, a tf.data.Dataset or a keras.utils.PyDataset in private "
            f"training. Received: x of type {type(x).__name__}. Convert it to one of these."
        )


def check_copies(privacy: DPSGD, augment: Any, source: data.Source | None = None) -> None:
    """Refuses several augmentations without an `augment` function, or without copies.

    Args:
        privacy: The settings.
        augment: As in `fit`.
        source: The data, if it is read already.

    Raises:
        ArgumentError: `augment` is missing, or the data repeats rows another number of times.
    """
    if privacy.augmentations > 1 and augment is None:
        raise ArgumentError(
            "`augmentations` must be given with `augment` of `fit`, or all copies are the "
            f"same. Received: augmentations={privacy.augmentations!r} and augment=None. Pass "
            "`augment`."
        )
    copies = privacy.augmentations if source is None else source.drawn_from.copies
    if copies != privacy.augmentations:
        # Otherwise different examples would be clipped together as copies of one.
        raise ArgumentError(
            "`augmentations` must be the number of copies that the data has of each example. "
            f"Received: augmentations={privacy.augmentations!r} and data with {copies}. Pass "
            "arrays, which tfdist copies itself."
        )


def check_users(privacy: DPSGD, shard: Any, validation_split: float) -> None:
    """Refuses arguments that would separate a user's examples.

    Args:
        privacy: The settings.
        shard: As in `fit`.
        validation_split: As in `fit`.

    Raises:
        ArgumentError: An argument would separate them.
    """
    if privacy.group_ids is None:
        return
    if shard is not None:
        raise ArgumentError(
            "`group_ids` needs data that all workers pass alike: a user's examples are clipped "
            f"together, on one replica. Received: shard={shard!r}. Leave `shard` out."
        )
    if validation_split:
        raise ArgumentError(
            "`validation_split` must not divide a user's examples, of which some would be "
            f"trained on. Received: validation_split={validation_split!r} with `group_ids`. "
            "Pass validation_data of other users."
        )


def check_callbacks(callbacks: Any, x: Any) -> None:
    """Refuses callbacks that use values of single examples without noise.

    Args:
        callbacks: As in `fit`.
        x: As in `fit`.

    Raises:
        ArgumentError: A callback is not private.
    """
    listed = callback_kinds.listed(callbacks)
    leaking_callbacks.check_callbacks(listed)
    for callback in listed:
        counted = callback_kinds.counted_rows(callback)
        if counted is not None and shared_rows.has_rows_of(counted, x):
            name = type(callback).__name__
            raise ArgumentError(
                f"{name} must not use the training data in private training: it counts single "
                f"examples, without noise. Received: {name} with rows of `x`. Give it data "
                "that need not be protected."
            )


def check_validation(
    callbacks: Any, x: Any, validation_data: Any, validation_split: float
) -> bool:
    """Refuses decisions by validation on protected data.

    Validation has neither clipping nor noise. Two things cannot be detected: other data that
    need protection, and calls of `fit` that depend on earlier validation, as tuners make them.

    Args:
        callbacks: As in `fit`.
        x: As in `fit`.
        validation_data: As in `fit`.
        validation_split: As in `fit`.

    Returns:
        Whether validation uses protected data, or may use it.

    Raises:
        ArgumentError: A callback decides by validation on protected data.
    """
    received = "validation_split"
    if validation_data is not None:
        validation_x = keras.utils.unpack_x_y_sample_weight(validation_data)[0]
        validation_x = _keras.undistributed(validation_x)
        received = "validation_data with rows of `x`"
        if not shared_rows.can_compare(validation_x, x):
            kind = type(validation_x).__name__
            received = f"validation_data of type {kind}, which may have rows of `x`"
        elif not shared_rows.has_rows_of(validation_x, x):
            return False
    elif not validation_split:
        return False
    listed = getattr(callbacks, "callbacks", callbacks)
    for callback in listed if isinstance(listed, list | tuple) else [listed]:
        if leaking_callbacks.decides_by_validation(callback):
            raise ArgumentError(
                "Private training must not depend on validation on protected data, which has "
                f"no noise. Received: {received}, and {type(callback).__name__} with "
                f"monitor={callback.monitor!r}. Pass validation_data that need not be "
                "protected, or leave the callback out."
            )
    return True
