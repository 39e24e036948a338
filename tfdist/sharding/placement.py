"""`tfdist.placement`: where each variable of a model is while it trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from tfdist import _keras
from tfdist.sharding.axis_cuts import AxisCut
from tfdist.sharding.cuts import Cut
from tfdist.sharding.pipeline import placement as of_stages
from tfdist.sharding.pipeline.strategy import Pipeline
from tfdist.sharding.updates import ShardedUpdates
from tfdist.strategies import placement as of_servers
from tfdist.strategies.session import Session, current


@dataclass(frozen=True)
class DeviceHome:
    """A variable, and the part of it that each device has.

    Attributes:
        path: The variable's path in the model.
        shape: The shape of the whole variable.
        layout: "whole"; or for each dimension the axis of the mesh along which it is divided,
            or "-"; or the number of equal parts in which its elements are dealt out.
        use: "own slice" if a layer computes with the part, "gathered" if it reads the whole
            variable, "" if each device has all of it.
        bytes: Number of bytes on each device.
        state_bytes: Number of bytes of the optimizer's state for it on each device.
    """

    path: str
    shape: tuple[int, ...]
    layout: str
    use: str
    bytes: int
    state_bytes: int


@dataclass(frozen=True)
class DevicePlacement(of_servers.PlacementTable):
    """Where each variable is on devices that all have as much. It prints as a table.

    Attributes:
        homes: All variables of the model, in its order.
        num_devices: Number of devices.
    """

    homes: tuple[DeviceHome, ...]
    num_devices: int
    _columns = ("variable", "shape", "layout", "use", "bytes", "optimizer's")
    _num_left = 4

    @property
    def bytes_of_each(self) -> int:
        """Number of bytes on each device, with the optimizer's state."""
        return sum(home.bytes + home.state_bytes for home in self.homes)

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (h.path, str(h.shape), h.layout, h.use, f"{h.bytes:,}", f"{h.state_bytes:,}")
            for h in self.homes
        ]

    @property
    def _totals(self) -> str:
        return f"bytes on each of {self.num_devices} device(s): {self.bytes_of_each:,}"


def placement(
    model: Any, strategy: Any = "auto"
) -> of_servers.Placement | of_stages.StagePlacement | DevicePlacement:
    """Shows where each variable of a model is during training, without training.

    Args:
        model: A compiled and built `keras.Model`. Its optimizer gets its state, if it has none.
        strategy: As in `tfdist.fit`.

    Returns:
        The placement. Print it to see a table. With parameter servers, it names the server of
        each variable, and with `tfdist.Pipeline` the device of its stage. Otherwise it says
        which part of each variable every device has.

    Raises:
        ArgumentError: The model is not built, or a layout map does not fit it.

    Example:
        >>> import keras, tfdist
        >>> layers = [keras.Input((8,)), keras.layers.Dense(4, name="last")]
        >>> model = keras.Sequential(layers, name="net")
        >>> model.compile("sgd", "mse")
        >>> print(tfdist.placement(model))
        variable     shape   layout  use  bytes  optimizer's
        last/kernel  (8, 4)  whole          128            0
        last/bias    (4,)    whole           16            0
        bytes on each of 1 device(s): 144
    """
    if of_servers.has_servers(strategy):
        return of_servers.placement(model, strategy)
    session = current(strategy)
    optimizers = of_servers.built_optimizers(model)
    slots: dict[int, list[Any]] = {}
    for optimizer in optimizers:
        if len(_keras.with_nested([optimizer])) == 1:
            for weight, variables in _keras.trained_by(optimizer):
                slots.setdefault(id(weight), []).extend(variables)
    if session.strategy.has_stages:
        return of_stages.placement(model, cast(Pipeline, session.strategy).plan(model), slots)
    cuts, divided = _cuts(model, session)
    axis = getattr(session.zero, "model_axis", None)
    homes = []
    for variable in model.variables:
        cut = cuts.get(id(variable))
        is_divided = id(variable) in divided
        homes.append(
            DeviceHome(
                variable.path,
                tuple(variable.shape),
                _layout(cut, axis),
                "" if cut is None else "own slice" if is_divided else "gathered",
                _bytes(variable, cut),
                sum(_bytes(s, cuts.get(id(s))) for s in slots.get(id(variable), [])),
            )
        )
    return DevicePlacement(tuple(homes), session.strategy.place.num_replicas)


def _cuts(model: Any, session: Session) -> tuple[dict[int, Cut], set[int]]:
    zero = session.zero
    if zero is None or session.strategy.place.num_replicas == 1:
        return {}, set()
    maker = ShardedUpdates.of(zero)
    exchange = maker.make(model, session.strategy)
    return exchange.cuts, set(exchange.division.cuts)


def _layout(cut: Cut | None, axis: str | None) -> str:
    if cut is None:
        return "whole"
    if isinstance(cut, AxisCut):
        names = ["-"] * len(cut.shape)
        names[cut.axis] = str(axis)
        return f"({', '.join(names)})"
    return f"{cut.parts} parts"


def _bytes(variable: Any, cut: Cut | None) -> int:
    if cut is None:
        return int(_keras.num_bytes(variable))
    return int(_keras.num_bytes(variable)) * cut.part_size // max(cut.size, 1)
