"""Which layers a team of replicas computes in parts, by the axes along which weights are cut.

A team has the rows of a batch of all its members; see `teams`.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import keras

from tfdist._keras.model_graph import functional_of
from tfdist._keras.parallel_attention import AttentionCall, HeadsCall
from tfdist._keras.parallel_chains import ProductCut, chain_of, cut_of_einsum
from tfdist._keras.parallel_layers import (
    BetweenCall,
    ColumnCall,
    EmbeddingCall,
    ParallelCall,
    RowCall,
    RunningCall,
)
from tfdist._keras.teams import Links
from tfdist.errors import ArgumentError

ATTENTION = (keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention)
MakeCall = Callable[[Links], ParallelCall]


@dataclass
class ParallelPlan:
    """The layers that teams compute.

    Attributes:
        weights: The axis along which each divided weight is cut, by the weight's id.
        layers: The names of the layers that are computed in parts.
        calls: Layers whose `call` is replaced, each with what makes the replacement.
        unchecked: Layers whose inputs may have fewer columns than their weights.
    """

    weights: dict[int, int] = field(default_factory=dict)
    layers: list[str] = field(default_factory=list)
    calls: list[tuple[Any, MakeCall]] = field(default_factory=list)
    unchecked: list[Any] = field(default_factory=list)

    @contextlib.contextmanager
    def computing(self, links: Links) -> Iterator[None]:
        """Makes a context in which teams compute the layers.

        Args:
            links: The collectives of the teams.
        """
        specs = [(layer, layer.input_spec) for layer in self.unchecked]
        for layer, make in self.calls:
            # Not with `setattr`, which Keras watches for layers and variables.
            vars(layer)["call"] = make(links)
        for layer, spec in specs:
            layer.input_spec = keras.InputSpec(ndim=spec.ndim, min_ndim=spec.min_ndim)
        try:
            yield
        finally:
            for layer, spec in specs:
                layer.input_spec = spec
            for layer, _ in self.calls:
                vars(layer).pop("call", None)


def parallel_plan(
    model: Any, axes: Mapping[int, int], ways: int, divides_tables: bool = True
) -> ParallelPlan:
    """Finds the layers that a team can compute in parts.

    Args:
        model: A built `keras.Model`.
        axes: The axis along which a map cuts each weight, by the weight's id.
        ways: Number of replicas of a team.
        divides_tables: Whether embeddings may be computed in parts.

    Raises:
        ArgumentError: Heads of attention cannot be divided by `ways`.
    """
    plan = ParallelPlan()
    layers = list({id(layer): layer for layer in model._flatten_layers()}.values())
    owners = Counter(id(v) for layer in layers for v in layer._trainable_variables)
    finder = _Finder(plan, axes, ways, owners)
    for layer in layers:
        if type(layer) in ATTENTION:
            finder.add_attention(layer)
    of_attention = {id(layer) for layer, _ in plan.calls}
    cut: dict[int, tuple[Any, ProductCut]] = {}
    for layer in layers:
        if id(layer) in of_attention or "call" in vars(layer):
            continue
        if type(layer) is keras.layers.Embedding and divides_tables:
            finder.add_embedding(layer)
        elif type(layer) in (keras.layers.Dense, keras.layers.EinsumDense):
            layer_cut = finder.cut_of(layer)
            if layer_cut is not None:
                cut[id(layer)] = layer, layer_cut
    _add_products(plan, finder, layers, cut)
    return plan


@dataclass
class _Finder:
    plan: ParallelPlan
    axes: Mapping[int, int]
    ways: int
    owners: Counter[int]

    def cut_of(self, layer: Any) -> ProductCut | None:
        """Returns where a Dense or EinsumDense is cut, or None if it is not."""
        kernel = getattr(layer, "_kernel", None)
        axis = self._axis(layer, kernel)
        if axis is None or layer.activity_regularizer is not None:
            return None
        if type(layer) is keras.layers.Dense:
            return ProductCut(axis == 1, -1, axis)
        return cut_of_einsum(layer.equation, axis)

    def _axis(self, layer: Any, weight: Any) -> int | None:
        """Returns the axis along which a layer's weight is divided, or None."""
        if weight is None or id(weight) not in self.axes or self.owners[id(weight)] > 1:
            return None
        if layer.quantization_mode is not None or layer.lora_enabled:
            return None
        axis = self.axes[id(weight)]
        return None if weight.shape[axis] % self.ways else axis

    def add_bias(self, layer: Any, axis: int) -> None:
        """Divides a bias that the map cuts as its layer's output is cut."""
        bias = layer.bias
        if bias is None or self.owners[id(bias)] > 1:
            return
        if self.axes.get(id(bias)) == len(bias.shape) + axis:
            self.plan.weights[id(bias)] = self.axes[id(bias)]

    def add_embedding(self, layer: Any) -> None:
        """Adds an Embedding, if its table is cut."""
        axis = self._axis(layer, getattr(layer, "_embeddings", None))
        if axis is not None:
            self.plan.weights[id(layer._embeddings)] = axis
            self.plan.layers.append(layer.name)
            self.plan.calls.append((layer, lambda links: EmbeddingCall(layer, links, axis)))

    def add_attention(self, layer: Any) -> None:
        """Adds an attention layer, if all of its projections are cut by heads."""
        names = ["_query_dense", "_key_dense", "_value_dense", "_gate_dense"]
        inner = [getattr(layer, name) for name in names if hasattr(layer, name)]
        last = layer._output_dense
        wanted = [(dense, 1) for dense in inner] + [(last, 0)]
        if any(self.axes.get(id(d._kernel)) != axis for d, axis in wanted):
            return
        self._check_heads(layer, [d._kernel.shape[1] for d in inner])
        if any(self._axis(d, d._kernel) is None for d, _ in wanted):
            return
        if any(d.activity_regularizer is not None or "call" in vars(d) for d, _ in wanted):
            return
        if "call" in vars(layer):
            return
        for dense, axis in wanted:
            self.plan.weights[id(dense._kernel)] = axis
            if dense is not last:
                self.add_bias(dense, -2)
            self.plan.calls.append((dense, _heads_call(dense, layer, dense is last)))
        is_multi_head = type(layer) is keras.layers.MultiHeadAttention
        attended = len(layer._attention_axes) if is_multi_head else 1
        heads_axis = -2 * attended - 1
        self.plan.layers.append(layer.name)
        self.plan.calls.append((layer, lambda links: AttentionCall(layer, links, heads_axis)))

    def _check_heads(self, layer: Any, heads: list[int]) -> None:
        if any(number % self.ways for number in heads):
            raise ArgumentError(
                "The heads of an attention layer must be divisible by the size of the mesh's "
                f"axis. Received: {layer.name!r} with {min(heads)} heads over {self.ways} "
                "devices. Choose another mesh, or leave the layer's weights out of the map."
            )


def _heads_call(dense: Any, attention: Any, is_last: bool) -> MakeCall:
    return lambda links: HeadsCall(dense, links, attention, is_last)


def _add_products(
    plan: ParallelPlan,
    finder: _Finder,
    layers: list[Any],
    cut: dict[int, tuple[Any, ProductCut]],
) -> None:
    """Adds Dense and EinsumDense layers, and finds those between which columns stay cut."""
    functionals = {id(f): f for layer in layers if (f := functional_of(layer)) is not None}
    sources: dict[int, Any] = {}
    stays: dict[int, Any] = {}
    for layer, where in cut.values():
        chain = chain_of(layer, where, cut, functionals) if where.is_column else None
        if chain is None:
            continue
        model, between, lasts = chain
        stays[id(layer)] = model
        for middle in between:
            plan.calls.append((middle, _between_call(middle, layer, where.axis)))
        for last in lasts:
            sources[id(last)] = layer
            plan.unchecked.append(last)
    for model in {id(m): m for m in stays.values()}.values():
        plan.calls.append((model, _running_call(model)))
    for layer, where in cut.values():
        plan.weights[id(layer._kernel)] = where.kernel_axis
        plan.layers.append(layer.name)
        if where.is_column:
            finder.add_bias(layer, where.axis)
            plan.calls.append((layer, _column_call(layer, where, stays.get(id(layer)))))
        else:
            plan.calls.append((layer, _row_call(layer, where, sources.get(id(layer)))))


def _between_call(layer: Any, source: Any, axis: int) -> MakeCall:
    return lambda links: BetweenCall(layer, links, source, axis)


def _running_call(model: Any) -> MakeCall:
    return lambda links: RunningCall(model, links)


def _column_call(layer: Any, where: ProductCut, model: Any) -> MakeCall:
    return lambda links: ColumnCall(layer, links, where.axis, model)


def _row_call(layer: Any, where: ProductCut, source: Any) -> MakeCall:
    return lambda links: RowCall(layer, links, where.axis, source)
