"""The layers that teams of replicas compute in parts, and the weights that they divide."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from tfdist import _keras
from tfdist.sharding.axis_cuts import AxisCut
from tfdist.sharding.teams import TeamLinks
from tfdist.step.state import optimizers_of
from tfdist.strategies.base import Strategy

Tensor = Any


@dataclass(frozen=True)
class Division:
    """The layers that teams compute.

    Attributes:
        plan: The layers.
        links: The collectives of the teams.
        cuts: How each weight is cut, by the id of its `keras.Variable`.
    """

    plan: _keras.ParallelPlan
    links: TeamLinks
    cuts: Mapping[int, AxisCut]

    @classmethod
    def none(cls, strategy: Strategy) -> Division:
        """Returns a division of no layer.

        Args:
            strategy: The strategy.
        """
        return cls(_keras.ParallelPlan(), TeamLinks(strategy, 1), {})

    def computing(self) -> contextlib.AbstractContextManager[None]:
        """Makes a context in which teams compute the layers."""
        return self.plan.computing(self.links)

    def own_gradient(self, variable: Any, whole: Tensor) -> Tensor:
        """Sums the gradient of a whole weight over the team, and returns the own slice.

        Args:
            variable: A divided weight.
            whole: The gradient, dense or `tf.IndexedSlices`.
        """
        cut = self.cuts[id(variable)]
        if isinstance(whole, tf.IndexedSlices):
            rows = self.links.sum_in_team(whole)
            return cut.own_rows(rows, self.links.member())
        return tf.reduce_sum(self.links.swap(cut.slices(whole)), 0)

    def counted(self, variable: Any, square: Tensor) -> Tensor:
        """Returns what a slice adds to a sum over all replicas, some of which have the same.

        Args:
            variable: A weight in parts.
            square: A number that was computed of the replica's part.
        """
        if id(variable) not in self.cuts:
            return square
        return tf.where(self.links.is_first_team(), square, tf.zeros_like(square))


def divide(
    model: Any, strategy: Strategy, axes: Mapping[int, int], ways: int
) -> Division | None:
    """Finds what teams can compute.

    Args:
        model: A built `keras.Model`.
        strategy: The strategy.
        axes: The axis along which a map cuts each weight, by the id of its `keras.Variable`.
        ways: Number of replicas of a team.

    Returns:
        The division, or None if the gradients of an own `train_step` may not be parts of the
        batch's gradient.
    """
    if _keras.has_own(model, "train_step"):
        return None
    optimizers = [o for o in optimizers_of(model) if len(_keras.with_nested([o])) == 1]
    by_element = all(map(_keras.is_elementwise, optimizers))
    plan = _keras.parallel_plan(model, axes, ways, divides_tables=by_element)
    replicas = strategy.place.num_replicas
    cuts = {
        id(v): AxisCut(tuple(v.shape), replicas, plan.weights[id(v)], ways)
        for v in model.weights
        if id(v) in plan.weights
    }
    return Division(plan, TeamLinks(strategy, ways), cuts)
