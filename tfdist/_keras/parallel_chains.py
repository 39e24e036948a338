"""Products that are cut, and the layers between two of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import keras

_BETWEEN = (
    keras.layers.Activation,
    keras.layers.Dropout,
    keras.layers.ELU,
    keras.layers.LeakyReLU,
    keras.layers.ReLU,
)
# Activations that treat each element by itself. Others see whole rows.
_BY_ELEMENT = frozenset(
    {
        "celu", "elu", "exponential", "gelu", "hard_shrink", "hard_sigmoid", "hard_silu",
        "hard_tanh", "leaky_relu", "linear", "log_sigmoid", "mish", "relu", "relu6", "selu",
        "sigmoid", "silu", "soft_shrink", "softplus", "softsign", "sparse_plus",
        "squareplus", "tanh", "tanh_shrink", "threshold",
    }
)  # fmt: skip


@dataclass(frozen=True)
class ProductCut:
    """Where a product is cut.

    Attributes:
        is_column: Whether its output is cut, else its input.
        axis: The axis of the columns there, a negative number.
        kernel_axis: The axis of the kernel.
    """

    is_column: bool
    axis: int
    kernel_axis: int


def cut_of_einsum(equation: str, kernel_axis: int) -> ProductCut | None:
    """Returns where an EinsumDense is cut whose kernel is cut along an axis.

    Args:
        equation: Its equation, such as "abc,cd->abd".
        kernel_axis: The axis.

    Returns:
        The cut, or None if a team cannot compute such a layer.
    """
    given, made = equation.replace(" ", "").split("->")
    inputs, kernel = given.split(",")
    letter = kernel[kernel_axis]
    # The batch must be the first axis of both.
    is_batched = inputs[:1] == made[:1] and inputs[:1] not in kernel
    if not is_batched or "." in kernel:
        return None
    for text, other, is_column in ((made, inputs, True), (inputs, made, False)):
        if letter in text and letter not in other:
            behind = text[text.index(letter) :]
            is_counted = "." not in behind
            return ProductCut(is_column, -len(behind), kernel_axis) if is_counted else None
    return None


def chain_of(
    first: Any,
    where: ProductCut,
    cut: Mapping[int, tuple[Any, ProductCut]],
    models: Mapping[int, Any],
) -> tuple[Any, list[Any], list[Any]] | None:
    """Follows a layer's output to layers whose input is cut alike.

    Returns:
        The functional model of all these layers, the layers in between, and the last ones.
        None if its columns reach another layer, or the end of a model.
    """
    # A layer also keeps nodes of models that are gone.
    model_of = [(node, m) for m in models.values() for node in _nodes(m)]
    ends = {id(t) for m in models.values() for t in keras.tree.flatten(m.outputs)}

    def alive(nodes: list[Any]) -> list[tuple[Any, Any]]:
        wanted = set(map(id, nodes))
        return [(node, m) for node, m in model_of if id(node) in wanted]

    entering = alive(first._inbound_nodes)
    if not _is_by_element(first) or len(entering) != 1 or "call" in vars(entering[0][1]):
        return None
    model = entering[0][1]
    between: list[Any] = []
    lasts: list[Any] = []
    open_nodes = [entering[0][0]]
    while open_nodes:
        node = open_nodes.pop()
        following = alive(node.operation._outbound_nodes)
        if not following or any(id(t) in ends for t in node.outputs):
            return None
        for next_node, _ in following:
            layer = next_node.operation
            is_alone = len(next_node.input_tensors) == len(alive(layer._inbound_nodes)) == 1
            if not is_alone or "call" in vars(layer):
                return None
            other = cut.get(id(layer))
            if other is not None and not other[1].is_column and other[1].axis == where.axis:
                lasts.append(layer)
            elif _is_between(layer):
                between.append(layer)
                open_nodes.append(next_node)
            else:
                return None
    return model, between, lasts


def _nodes(model: Any) -> list[Any]:
    return [node for nodes in model._nodes_by_depth.values() for node in nodes]


def _is_between(layer: Any) -> bool:
    if type(layer) not in _BETWEEN or getattr(layer, "activity_regularizer", None) is not None:
        return False
    if type(layer) is keras.layers.Dropout and layer.noise_shape is not None:
        return False
    return type(layer) is not keras.layers.Activation or _is_by_element(layer)


def _is_by_element(layer: Any) -> bool:
    function = layer.activation
    if function is None:
        return True
    is_keras_s = getattr(function, "__module__", "").startswith("keras.")
    return is_keras_s and getattr(function, "__name__", "") in _BY_ELEMENT
