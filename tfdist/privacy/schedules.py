"""Noise and norms that follow a schedule: what each step gets, known before training.

A schedule is evaluated for all planned steps before the first one, so nothing that training
sees can move it, and the accountant composes the noise that each step really has: with
multipliers and norms that are fixed in advance, steps compose as any others do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from tfdist import _keras
from tfdist.errors import ArgumentError
from tfdist.privacy.accounting.arguments import check_number
from tfdist.privacy.accounting.levels import Levels
from tfdist.privacy.settings import DPSGD, LARGEST_NORM, LEAST_NORM

Tensor = Any
Values = NDArray[np.float64]
MOST_LEVELS = 32
"""Different multipliers of a training: each costs the accountant a distribution."""


class Now(NamedTuple):
    """What a step gets.

    Attributes:
        norm: To clip to, scalar float32.
        unit: Of the noise that the least multiplier of the schedule would give: the norm times
            the step's multiplier over the least one, scalar float64.
    """

    norm: Tensor
    unit: Tensor


@dataclass(frozen=True)
class StepSchedule(Levels):
    """The multiplier and the norm of each step, as runs of steps that have the same.

    Args:
        begins: As in `Levels`.
        multipliers: As in `Levels`.
        norms: Of each run.
    """

    norms: tuple[float, ...]

    def scaled(self, factor: float) -> StepSchedule:
        """Gives the schedule with all multipliers multiplied.

        Args:
            factor: By which.
        """
        return replace(self, multipliers=tuple(factor * m for m in self.multipliers))

    def at(self, step: Tensor) -> Now:
        """Gives what a step gets, in a graph.

        Args:
            step: The step's number, scalar int64.
        """
        with tf.device("CPU:0"):
            begins = tf.constant(self.begins, tf.int64)
            run = tf.searchsorted(begins, tf.reshape(step, [1]), "right")[0] - 1
            norms, multipliers = np.array(self.norms), np.array(self.multipliers)
            units = norms * (multipliers / self.least if self.least else 1.0)
            norm = tf.constant(norms, tf.float32)[run]
            return Now(norm, tf.constant(units, tf.float64)[run])

    @property
    def fingerprint(self) -> str:
        """Sums it up."""
        text = repr((self.begins, self.multipliers, self.norms))
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def schedule_of(privacy: DPSGD, steps: int) -> StepSchedule | None:
    """Evaluates schedules for all steps.

    A multiplier that takes more than `MOST_LEVELS` values is rounded down to so many: then it
    is these that steps have, and that are accounted.

    Args:
        privacy: The settings.
        steps: That are planned. Later ones get what the last of these gets.

    Returns:
        What each step gets, or None if all get the same.

    Raises:
        ArgumentError: A schedule gives something else than numbers in the range of what it
            stands for, or depends on something else than the step.
    """
    if not privacy.is_scheduled:
        return None
    steps = max(1, steps)
    asked = privacy.noise_multiplier
    multipliers = _values("noise_multiplier", 1.0 if asked is None else asked, steps)
    norms = _values("l2_norm_clip", privacy.l2_norm_clip, steps)
    check_number("l2_norm_clip", norms.min(), LEAST_NORM, LARGEST_NORM)
    check_number("l2_norm_clip", norms.max(), LEAST_NORM, LARGEST_NORM)
    if callable(asked):
        check_number("noise_multiplier", multipliers.min(), 0, open_ends=True)
        multipliers = _rounded_down(multipliers)
    # As the gradients' dtype has them, so that noise is of the norm that is clipped to.
    norms = norms.astype(np.float32).astype(np.float64)
    changes = (np.diff(multipliers) != 0) | (np.diff(norms) != 0)
    begins = np.concatenate([[0], 1 + np.flatnonzero(changes)])
    return StepSchedule(
        tuple(begins.tolist()),
        tuple(multipliers[begins].tolist()),
        tuple(norms[begins].tolist()),
    )


def without_schedules(privacy: DPSGD) -> DPSGD:
    """Gives settings in which all steps have what the first one has.

    Args:
        privacy: The settings.
    """
    first = schedule_of(privacy, 1)
    if first is None:
        return privacy
    noise = None if privacy.target_epsilon is not None else first.multipliers[0]
    return replace(privacy, l2_norm_clip=first.norms[0], noise_multiplier=noise)


def norm_of(privacy: DPSGD) -> float:
    """Gives the norm that gradients are clipped to; the first step's, if it has a schedule.

    Args:
        privacy: The settings.
    """
    norm = without_schedules(privacy).l2_norm_clip
    assert not callable(norm)
    return norm


def _values(name: str, given: float | Callable[[int], Any], steps: int) -> Values:
    if not callable(given):
        return np.full(steps, float(given))
    _check_closed(name, given)
    try:
        found = _evaluated(given, steps)
        some = np.unique(np.linspace(0, steps - 1, 16).astype(np.int64))
        again = np.array([float(given(int(step))) for step in some])
    except Exception as error:
        raise ArgumentError(
            f"A schedule of `{name}` must give a number for each step's number. Received: "
            f"{given!r}, which raised {type(error).__name__}: {error}"
        ) from error
    if not np.isfinite(found).all():
        step = int(np.flatnonzero(~np.isfinite(found))[0])
        raise ArgumentError(
            f"A schedule of `{name}` must give finite numbers. Received: {found[step]} for "
            f"step {step}."
        )
    same = np.isclose(found[some], again, rtol=1e-5)  # vectors and scalars round differently
    if not same.all():
        step = int(some[~same][0])
        raise ArgumentError(
            f"A schedule of `{name}` must give the same for the same step. Received: "
            f"{found[step]:g} and {float(given(step)):g} for step {step}. It must depend on "
            "nothing but the step."
        )
    return found


def _evaluated(given: Callable[[int], Any], steps: int) -> Values:
    """Calls a schedule with each step; a Keras one in a graph, which is faster."""
    if isinstance(given, keras.optimizers.schedules.LearningRateSchedule):
        try:
            return _mapped(given, steps)
        except Exception:  # one by one, then: if that fails too, it is said
            pass
    return np.array([float(given(step)) for step in range(steps)])


def _mapped(given: Callable[[int], Any], steps: int) -> Values:
    def each(step: Tensor) -> Tensor:
        return tf.reshape(tf.cast(given(step), tf.float64), [])

    with tf.device("CPU:0"):
        numbers = tf.range(steps, dtype=tf.int64)
        mapped = tf.function(
            lambda all_: _keras.map_fn(each, all_, fn_output_signature=tf.float64)
        )
        found: Values = mapped(numbers).numpy()
    return found


def _check_closed(name: str, given: Callable[[int], Any]) -> None:
    """Refuses what reads variables: they may hold what training found in the data."""
    try:
        traced = tf.function(given).get_concrete_function(tf.TensorSpec([], tf.int64))
    except Exception:
        return  # plain Python, which cannot be looked into
    if any(t.dtype == tf.resource for t in traced.captured_inputs):
        raise ArgumentError(
            f"A schedule of `{name}` must depend on nothing but the step. Received: {given!r}, "
            "which reads variables. What follows the data needs a budget of its own: "
            "`target_quantile` moves the norm privately."
        )


def _rounded_down(values: Values) -> Values:
    """Rounds to few values, none above what it stands for."""
    kept: Values = np.unique(values)
    if len(kept) > MOST_LEVELS:
        kept = np.geomspace(kept[0], kept[-1], MOST_LEVELS)
        kept[0], kept[-1] = values.min(), values.max()  # but for rounding
    return kept[np.searchsorted(kept, values, "right") - 1]
