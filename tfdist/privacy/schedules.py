"""Schedules of the noise and of the clipping norm, evaluated before training.

A schedule is evaluated for all planned steps before the first one, so it cannot depend on the
data. The accountant then composes the noise of each step: with multipliers and norms that are
fixed in advance, steps compose as steps with equal noise do.
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
"""The most different multipliers of a training. Each costs the accountant a distribution."""


class ScheduledStep(NamedTuple):
    """The norm and the noise of one step.

    Attributes:
        norm: The clipping norm, scalar float32.
        unit: The unit of the noise, scalar float64: the norm times the step's multiplier over
            the schedule's least multiplier. Noise of the least multiplier in this unit is the
            step's noise.
    """

    norm: Tensor
    unit: Tensor


@dataclass(frozen=True)
class StepSchedule(Levels):
    """The multiplier and the norm of each step, as runs of steps with equal values.

    Args:
        begins: As in `Levels`.
        multipliers: As in `Levels`.
        norms: The norm of each run.
    """

    norms: tuple[float, ...]

    def scaled(self, factor: float) -> StepSchedule:
        """Returns the schedule with all multipliers scaled.

        Args:
            factor: The factor by which they are multiplied.
        """
        return replace(self, multipliers=tuple(factor * m for m in self.multipliers))

    def at(self, step: Tensor) -> ScheduledStep:
        """Looks up the norm and the unit of a step, in a graph.

        Args:
            step: The step's number, scalar int64.
        """
        with tf.device("CPU:0"):
            begins = tf.constant(self.begins, tf.int64)
            run = tf.searchsorted(begins, tf.reshape(step, [1]), "right")[0] - 1
            norms, multipliers = np.array(self.norms), np.array(self.multipliers)
            units = norms * (multipliers / self.least if self.least else 1.0)
            norm = tf.constant(norms, tf.float32)[run]
            return ScheduledStep(norm, tf.constant(units, tf.float64)[run])

    @property
    def fingerprint(self) -> str:
        """A short hash, by which workers compare their schedules."""
        text = repr((self.begins, self.multipliers, self.norms))
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def schedule_of(privacy: DPSGD, steps: int) -> StepSchedule | None:
    """Evaluates schedules for all steps.

    If a multiplier takes more than `MOST_LEVELS` values, it is rounded down to that many. Steps
    have the rounded multipliers, and the accountant gets them too.

    Args:
        privacy: The settings.
        steps: The planned steps. Later steps have the values of the last planned one.

    Returns:
        The schedule, or None if all steps are equal.

    Raises:
        ArgumentError: A schedule returns something else than numbers in their range, or does
            not depend on the step alone.
    """
    if not privacy.is_scheduled:
        return None
    steps = max(1, steps)
    noise_multiplier = privacy.noise_multiplier
    multipliers = _values(
        "noise_multiplier", 1.0 if noise_multiplier is None else noise_multiplier, steps
    )
    norms = _values("l2_norm_clip", privacy.l2_norm_clip, steps)
    check_number("l2_norm_clip", norms.min(), LEAST_NORM, LARGEST_NORM)
    check_number("l2_norm_clip", norms.max(), LEAST_NORM, LARGEST_NORM)
    if callable(noise_multiplier):
        check_number("noise_multiplier", multipliers.min(), 0, open_ends=True)
        multipliers = _rounded_down(multipliers)
    # Gradients are clipped to float32 norms. Noise must be in units of the same rounded norms.
    norms = norms.astype(np.float32).astype(np.float64)
    changes = (np.diff(multipliers) != 0) | (np.diff(norms) != 0)
    begins = np.concatenate([[0], 1 + np.flatnonzero(changes)])
    return StepSchedule(
        tuple(begins.tolist()),
        tuple(multipliers[begins].tolist()),
        tuple(norms[begins].tolist()),
    )


def without_schedules(privacy: DPSGD) -> DPSGD:
    """Returns settings in which all steps have the values of the first one.

    Args:
        privacy: The settings.
    """
    first = schedule_of(privacy, 1)
    if first is None:
        return privacy
    noise = None if privacy.target_epsilon is not None else first.multipliers[0]
    return replace(privacy, l2_norm_clip=first.norms[0], noise_multiplier=noise)


def norm_of(privacy: DPSGD) -> float:
    """Returns the clipping norm. With a schedule it is that of the first step.

    Args:
        privacy: The settings.
    """
    norm = without_schedules(privacy).l2_norm_clip
    assert not callable(norm)
    return norm


def _values(name: str, schedule: float | Callable[[int], Any], steps: int) -> Values:
    """Evaluates a schedule, and checks that it depends on the step alone."""
    if not callable(schedule):
        return np.full(steps, float(schedule))
    _check_closed(name, schedule)
    try:
        values = _evaluated(schedule, steps)
        samples = np.unique(np.linspace(0, steps - 1, 16).astype(np.int64))
        repeated = np.array([float(schedule(int(step))) for step in samples])
    except Exception as error:
        raise ArgumentError(
            f"A schedule of `{name}` must return a number for the number of a step. Received: "
            f"{schedule!r}, which raised {type(error).__name__}: {error}"
        ) from error
    if not np.isfinite(values).all():
        step = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ArgumentError(
            f"A schedule of `{name}` must return finite numbers. Received: {values[step]} for "
            f"step {step}. Return a number for each step of the training."
        )
    # Vectors and scalars may round differently, so equality is not required.
    is_repeated = np.isclose(values[samples], repeated, rtol=1e-5)
    if not is_repeated.all():
        step = int(samples[~is_repeated][0])
        raise ArgumentError(
            f"A schedule of `{name}` must return the same number for the same step. Received: "
            f"{values[step]:g} and {float(schedule(step)):g} for step {step}. Let it depend on "
            "nothing but the step."
        )
    return values


def _evaluated(schedule: Callable[[int], Any], steps: int) -> Values:
    """Calls a schedule with each step. A Keras schedule is called in a graph, for speed."""
    if isinstance(schedule, keras.optimizers.schedules.LearningRateSchedule):
        try:
            return _mapped(schedule, steps)
        except Exception:  # the calls below raise the error if the schedule itself is wrong
            pass
    return np.array([float(schedule(step)) for step in range(steps)])


def _mapped(schedule: Callable[[int], Any], steps: int) -> Values:
    def value_at(step: Tensor) -> Tensor:
        return tf.reshape(tf.cast(schedule(step), tf.float64), [])

    with tf.device("CPU:0"):
        numbers = tf.range(steps, dtype=tf.int64)
        mapped = tf.function(
            lambda all_: _keras.map_fn(value_at, all_, fn_output_signature=tf.float64)
        )
        values: Values = mapped(numbers).numpy()
    return values


def _check_closed(name: str, schedule: Callable[[int], Any]) -> None:
    """Refuses a schedule that reads variables, which may depend on the data by training."""
    try:
        # A variable that the schedule reads is captured by its trace.
        traced = tf.function(schedule).get_concrete_function(tf.TensorSpec([], tf.int64))
    except Exception:
        return  # plain Python code: whether it reads variables cannot be seen
    if any(t.dtype == tf.resource for t in traced.captured_inputs):
        raise ArgumentError(
            f"A schedule of `{name}` must depend on nothing but the step. Received: "
            f"{schedule!r}, which reads variables. To follow the data, use `target_quantile`, "
            "which moves the norm privately."
        )


def _rounded_down(values: Values) -> Values:
    """Rounds down to at most `MOST_LEVELS` values, which the accountant then counts."""
    levels: Values = np.unique(values)
    if len(levels) > MOST_LEVELS:
        levels = np.geomspace(levels[0], levels[-1], MOST_LEVELS)
        levels[0], levels[-1] = values.min(), values.max()  # `geomspace` may round its ends
    return levels[np.searchsorted(levels, values, "right") - 1]
