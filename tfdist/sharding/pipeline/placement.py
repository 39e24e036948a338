"""The stage of each variable of a pipelined model, as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tfdist import _keras
from tfdist.sharding.pipeline.plan import PipelinePlan, short_name
from tfdist.strategies.placement import PlacementTable


@dataclass(frozen=True)
class StageHome:
    """A variable on the device of its stage.

    Attributes:
        path: The variable's path in the model.
        shape: Its shape.
        stage: The stage's number.
        bytes: Number of bytes.
        state_bytes: Number of bytes of the optimizer's state for it.
    """

    path: str
    shape: tuple[int, ...]
    stage: int
    bytes: int
    state_bytes: int


@dataclass(frozen=True)
class StagePlacement(PlacementTable):
    """The stage of each variable. It prints as a table.

    Attributes:
        homes: All variables of the model, in its order.
        devices: The short name of each stage's device.
    """

    homes: tuple[StageHome, ...]
    devices: tuple[str, ...]
    _columns = ("variable", "shape", "device", "bytes", "optimizer's")
    _num_left = 3

    def bytes_of(self, stage: int) -> int:
        """Counts the bytes on a stage's device, with the optimizer's state.

        Args:
            stage: The stage's number.
        """
        return sum(h.bytes + h.state_bytes for h in self.homes if h.stage == stage)

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (
                h.path,
                str(h.shape),
                self.devices[h.stage],
                f"{h.bytes:,}",
                f"{h.state_bytes:,}",
            )
            for h in self.homes
        ]

    @property
    def _totals(self) -> str:
        totals = [f"{d}: {self.bytes_of(n):,}" for n, d in enumerate(self.devices)]
        return f"bytes of each device: {'; '.join(totals)}"


def placement(
    model: Any, plan: PipelinePlan, slots: Mapping[int, Sequence[Any]]
) -> StagePlacement:
    """Finds the stage of each variable of a model.

    Args:
        model: The model.
        plan: Its stages.
        slots: The optimizer's variables for a weight, by the weight's id.
    """
    devices = [stage.device for stage in plan.stages]
    homes = []
    for variable in model.variables:
        device = plan.devices.get(id(variable), devices[-1])
        state = sum(map(_keras.num_bytes, slots.get(id(variable), ())))
        homes.append(
            StageHome(
                variable.path,
                tuple(variable.shape),
                devices.index(device),
                _keras.num_bytes(variable),
                state,
            )
        )
    return StagePlacement(tuple(homes), tuple(map(short_name, devices)))
