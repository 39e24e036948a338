"""The calls of attention layers whose heads a team divides; see `parallel_layers`."""

from __future__ import annotations

from typing import Any

import keras

from tfdist._keras.parallel_layers import (
    ParallelCall,
    activated,
    noting,
    own_bias,
    own_weight,
    product,
    running,
)
from tfdist._keras.replica import Tensor, current_batch
from tfdist._keras.teams import Links, drawing_columns, team_of

_REST = ("attention_mask", "return_attention_scores", "training", "use_causal_mask")


class AttentionCall(ParallelCall):
    """A MultiHeadAttention or GroupQueryAttention whose heads are divided.

    Its queries, keys and values come of the same gathered rows, so that their gradients are
    summed over the team together. Keras's own code computes the own heads.

    Args:
        layer: The layer.
        links: As in `ParallelCall`.
        heads_axis: The axis of the heads in the attention scores, a negative number.
    """

    _tensors = ("query", "value", "key", "query_mask", "value_mask", "key_mask")

    def __init__(self, layer: Any, links: Links, heads_axis: int) -> None:
        super().__init__(layer, links)
        self.heads_axis = heads_axis

    def __call__(
        self, query: Any, value: Any, key: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        names = self._tensors[3:]
        kwargs |= dict(zip((*names, *_REST), args, strict=False))
        tensors = [t for t in (query, value, key) if t is not None]
        masks = [kwargs[n] for n in (*names, "attention_mask") if kwargs.get(n) is not None]
        team = team_of(self.links, *tensors, *masks)
        if team is None:
            return self.original(query, value, key, **kwargs)
        gathered: dict[int, Tensor] = {}

        def rows_of_team(tensor: Any) -> Any:
            if tensor is None or (tensor.shape[0] == 1 and query.shape[0] != 1):
                return tensor  # the same for all examples
            if id(tensor) not in gathered:
                gathered[id(tensor)] = team.gathered(tensor)
            return gathered[id(tensor)]

        mask = getattr(query, "_keras_mask", None)
        for tensor in tensors:  # as Keras does, which takes the query's mask from there
            if hasattr(tensor, "_keras_mask"):
                tensor._keras_mask = None
        arguments = [rows_of_team(t) for t in (query, value, key)]
        if mask is not None:
            arguments[0]._keras_mask = rows_of_team(mask)
        for name in (*names, "attention_mask"):
            if kwargs.get(name) is not None:
                kwargs[name] = rows_of_team(kwargs[name])
        with drawing_columns(team, self.heads_axis), noting("attentions", self.layer):
            results = self.original(*arguments, **kwargs)
        has_scores = isinstance(results, tuple)
        outputs = team.summed(results[0] if has_scores else results)
        bias = self.layer._output_dense.bias
        if bias is not None:
            outputs = keras.ops.add(outputs, bias)
        if mask is not None:
            outputs._keras_mask = mask
        if not has_scores:
            return outputs
        return outputs, team.in_rows(results[1], self.heads_axis)


class HeadsCall(ParallelCall):
    """A projection of an attention layer, to or from the own heads.

    Args:
        layer: An EinsumDense.
        links: As in `ParallelCall`.
        attention: The attention layer.
        is_last: Whether it is the projection from the heads.
    """

    def __init__(self, layer: Any, links: Links, attention: Any, is_last: bool) -> None:
        super().__init__(layer, links)
        self.attention = attention
        self.is_last = is_last

    def __call__(self, inputs: Any, training: Any = None) -> Any:
        batch, layer = current_batch(), self.layer
        if self.attention not in running("attentions") or batch is None:
            return self.original(inputs, training=training)
        outputs = product(layer, inputs, own_weight(layer, layer._kernel))
        if self.is_last:  # the attention layer adds the bias to the sum
            return outputs
        if layer.bias is not None:
            outputs += own_bias(layer, batch.team, -2)
        return activated(layer, outputs)
