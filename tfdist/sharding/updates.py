"""Makes the exchange that a user's settings ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tfdist.sharding.division import divide
from tfdist.sharding.exchange import ShardedExchange
from tfdist.sharding.layout_map import layout_map
from tfdist.sharding.layouts import divided_along, named_by
from tfdist.strategies.base import Strategy
from tfdist.strategies.model_parallel import Layouts, ModelParallel
from tfdist.strategies.zero import Zero


@dataclass(frozen=True)
class ShardedUpdates:
    """Makes the exchange; see `ExchangeMaker`.

    Attributes:
        stage: As in `Zero`.
        gather_again: As in `Zero`.
        layouts: Those of `ModelParallel`, or None to choose weights by their sizes.
        mesh: The axes of the mesh of `layouts`, and their sizes.
        model_axis: The axis along which teams compute layers, or None.
    """

    stage: int = 1
    gather_again: bool = False
    layouts: Layouts | None = None
    mesh: tuple[tuple[str, int], ...] = ()
    model_axis: str | None = None

    @classmethod
    def of(cls, settings: Zero | ModelParallel) -> ShardedUpdates:
        """Returns what a user's settings ask for.

        Args:
            settings: The settings.
        """
        if isinstance(settings, Zero):
            return cls(settings.stage, settings.gather_again)
        layouts = settings.layout_map
        return cls(
            settings.stage,
            settings.gather_again,
            layouts if isinstance(layouts, tuple) else None,
            settings.mesh or (),
            settings.model_axis,
        )

    def make(self, model: Any, strategy: Strategy) -> ShardedExchange:
        """Makes the exchange.

        Args:
            model: A built `keras.Model`.
            strategy: The strategy on whose replicas it trains.
        """
        layouts, division = self.layouts, None
        if layouts is None and self.model_axis is not None:
            layouts = tuple(layout_map(model, dict(self.mesh)).items())
        named = None if layouts is None else named_by(layouts, model.weights)
        if named is not None and self.model_axis is not None:
            mesh = dict(self.mesh)
            axes = divided_along(named, self.model_axis, mesh)
            division = divide(model, strategy, axes, mesh[self.model_axis])
        return ShardedExchange(
            model,
            strategy,
            cuts_weights=self.stage == 3,
            gathers_again=self.stage == 3 and self.gather_again,
            named=None if named is None else set(named),
            division=division,
        )
