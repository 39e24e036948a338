"""Which layers of a model are on which device."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from tfdist import _keras
from tfdist.errors import ArgumentError


@dataclass(frozen=True)
class Stage:
    """The layers of one device.

    Attributes:
        device: The device's name.
        layers: The names of the layers, in their order.
        bytes: Number of bytes of their variables.
        flops: What they compute for an example, as far as it is known.
    """

    device: str
    layers: tuple[str, ...]
    bytes: int
    flops: int


@dataclass(frozen=True)
class PipelinePlan:
    """The stages of a model.

    Attributes:
        stages: The stages, in their order.
        piped: What the model's call needs of each.
        microbatches: Into how many parts a batch is cut.
    """

    stages: tuple[Stage, ...]
    piped: tuple[_keras.PipedStage, ...]
    microbatches: int

    @property
    def bubble(self) -> float:
        """The fraction of a step in which a device waits, if all stages take equally long."""
        waits = len(self.stages) - 1
        return waits / (self.microbatches + waits)

    @functools.cached_property
    def devices(self) -> dict[int, str]:
        """The device of each of the layers' variables, by the variable's id."""
        return {id(v): stage.device for stage in self.piped for v in stage.variables}

    def __str__(self) -> str:
        flops = sum(stage.flops for stage in self.stages) or 1
        lines = [
            f"  {short_name(stage.device)}: {_range(stage.layers)}, "
            f"{stage.bytes / 2**20:.3g} MiB, {stage.flops / flops:.0%} of the operations"
            for stage in self.stages
        ]
        waits = len(self.stages) - 1
        return "\n".join(
            [
                f"pipeline of {len(self.stages)} stages, {self.microbatches} micro-batches; a "
                f"device waits {waits}/{self.microbatches + waits} = {self.bubble:.0%} of a "
                "step if the stages take equally long",
                *lines,
            ]
        )


def plan(model: Any, devices: Sequence[str], microbatches: int) -> PipelinePlan:
    """Cuts a model into as many stages as there are devices.

    A cut is possible where a single tensor goes on, besides the model's inputs, and where no
    layer is used on both sides. Of these, the cuts are chosen for which the largest stage is
    smallest, by the bytes of its variables and by what it computes.

    Args:
        model: A built Sequential or functional `keras.Model`.
        devices: The names of the devices.
        microbatches: Into how many parts a batch is cut.

    Raises:
        ArgumentError: The model is of another kind, or has too few places for a cut.
    """
    functional = _keras.functional_of(model)
    if functional is None:
        raise ArgumentError(
            "`Pipeline` needs a keras.Sequential or functional model, whose graph it can cut. "
            f"Received: {type(model).__name__}. Make the model of its layers by "
            "keras.Model(inputs, outputs), or train without `Pipeline`."
        )
    _check_layers(model)
    calls = _keras.layer_calls(functional)
    cuts = _possible_cuts(calls, *_keras.ends(functional))
    if len(cuts) < len(devices) - 1:
        places = f"{len(devices) - 1} place{'s' if len(devices) > 2 else ''}"
        raise ArgumentError(
            f"A pipeline of {len(devices)} stages needs {places} in the model where a single "
            f"tensor goes on. Received: model {model.name!r} with {len(cuts)}. "
            "Branches and shared layers must end before such a place: use fewer stages, or put "
            "branches into a layer of their own."
        )
    costs = [_bytes(call.variables) for call in calls], [call.flops for call in calls]
    edges = [0, *_best(cuts, costs, len(devices)), len(calls)]
    _, outputs = _keras.ends(functional)
    stages, piped = [], []
    for number, device in enumerate(devices):
        own, later = calls[edges[number] : edges[number + 1]], calls[edges[number + 1] :]
        internal = {key for call in own for key in call.makes}
        needed = {key for call in later for key in call.reads} | set(outputs)
        takes = [key for call in own for key in call.reads if key not in internal]
        gives = [key for call in own for key in call.makes if key in needed]
        piped.append(
            _keras.PipedStage(
                device, tuple(own), tuple(dict.fromkeys(takes)), tuple(dict.fromkeys(gives))
            )
        )
        names = tuple(dict.fromkeys(call.name for call in own))
        flops = sum(costs[1][edges[number] : edges[number + 1]])
        stages.append(Stage(device, names, _bytes(piped[-1].variables), flops))
    return PipelinePlan(tuple(stages), tuple(piped), microbatches)


def _check_layers(model: Any) -> None:
    for layer in _keras.layers_of(model):
        if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable:
            raise ArgumentError(
                "In a pipeline, layers must compute each example by itself, as a batch comes "
                f"in parts. Received: the BatchNormalization layer {layer.name!r}. Use "
                "LayerNormalization or GroupNormalization, set its `trainable` to False, or "
                "train without `Pipeline`."
            )


def _possible_cuts(
    calls: Sequence[_keras.LayerCall], inputs: Sequence[int], outputs: Sequence[int]
) -> list[int]:
    """Lists the numbers of calls before which the model can be cut."""
    possible = []
    for cut in range(1, len(calls)):
        before, after = calls[:cut], calls[cut:]
        outputs_before = {key for call in before for key in call.makes}
        passed = outputs_before & {key for call in after for key in call.reads}
        own, others = ({id(v) for c in part for v in c.variables} for part in (before, after))
        if len(passed) == 1 and not own & others:
            possible.append(cut)
    return possible


def _best(
    cuts: Sequence[int], costs: tuple[Sequence[int], Sequence[int]], stages: int
) -> list[int]:
    """Chooses cuts for which the most expensive stage is cheapest, by dynamic programming.

    Example:
        >>> _best([1, 2, 3], ([1, 1, 1, 3], [0, 0, 0, 0]), 2)
        [3]
    """
    totals = [sum(cost) or 1 for cost in costs]
    shares = [
        sum(c / t for c, t in zip(pair, totals, strict=True))
        for pair in zip(*costs, strict=True)
    ]
    sums = [0.0]
    for share in shares:
        sums.append(sums[-1] + share)
    # The best way to end a stage at each place: its largest stage, and its cuts.
    best: dict[int, tuple[float, list[int]]] = {cut: (sums[cut], []) for cut in cuts}
    best[len(shares)] = (sums[-1], [])
    for _ in range(stages - 1):
        best = {
            end: min(
                (max(largest, sums[end] - sums[cut]), [*earlier, cut])
                for cut, (largest, earlier) in best.items()
                if cut < end
            )
            for end in (*cuts, len(shares))
            if any(cut < end for cut in best)
        }
    return best[len(shares)][1]


def _bytes(variables: Sequence[Any]) -> int:
    return sum(map(_keras.num_bytes, variables))


def short_name(device: str) -> str:
    """Shortens a device's name.

    Args:
        device: The full name.

    Example:
        >>> short_name("/device:CPU:1")
        'CPU:1'
        >>> short_name("/job:worker/replica:0/task:2/device:GPU:0")
        'worker 2, GPU:0'
    """
    parsed = tf.DeviceSpec.from_string(device)
    unit = f"{parsed.device_type}:{parsed.device_index}"
    return unit if parsed.job in (None, "localhost") else f"{parsed.job} {parsed.task}, {unit}"


def _range(layers: Sequence[str]) -> str:
    if len(layers) == 1:
        return layers[0]
    return f"{len(layers)} layers, {layers[0]} to {layers[-1]}"
