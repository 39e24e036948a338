"""`tfdist.recompute`: activations that are computed again in the backward pass."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import keras

from tfdist import _keras
from tfdist.errors import ArgumentError


@dataclass(frozen=True)
class Recomputation:
    """The layers of a model whose activations are computed again. It prints as a list.

    Attributes:
        paths: The path of each such layer in the model.
        kinds: The class of each such layer.
    """

    paths: tuple[str, ...]
    kinds: tuple[str, ...]

    def __str__(self) -> str:
        if not self.paths:
            return "all activations are kept"
        lines = [
            f"  {path} ({kind})" for path, kind in zip(self.paths, self.kinds, strict=True)
        ]
        return "\n".join(["activations are computed again in the backward pass:", *lines])


def recompute(model: Any, layers: str | Iterable[Any] = "blocks") -> Recomputation:
    """Saves memory: some layers compute their activations again instead of keeping them.

    In training, the backward pass needs the activations of the forward pass. A recomputed
    layer keeps only its inputs, and is called a second time in the backward pass (Chen et al.,
    "Training Deep Nets with Sublinear Memory Cost", 2016). The gradients are the same, up to
    float rounding: the second call gets the same random numbers, and does not change moving
    statistics again. A step takes longer by one forward pass of these layers.

    It acts in `model.fit`, in `tfdist.fit` and in a `tf.function` with a `GradientTape`. Eager
    code and asynchronous parameter servers keep all activations. A saved model is an ordinary
    one: call `recompute` again after loading it.

    Args:
        model: A `keras.Model` or layer. It is changed in place.
        layers: "blocks", or names, paths or `keras.Layer`s in the model. A name stands for all
            layers that have it. Blocks are layers made of other layers, several of the same
            kind next to each other, such as those of a transformer. A new call replaces the
            earlier choice; `[]` undoes it.

    Returns:
        The layers that are chosen. Print it to see them.

    Raises:
        ArgumentError: `model` is no layer, a name is not found, or there are no blocks.

    Example:
        >>> import keras, tfdist
        >>> block = lambda: keras.Sequential([keras.layers.Dense(8, "relu") for _ in range(2)])
        >>> model = keras.Sequential([keras.Input((8,)), block(), block()])
        >>> len(tfdist.recompute(model).paths)
        2
    """
    if not isinstance(model, keras.Layer):
        raise ArgumentError(
            "`model` must be a keras.Model or keras.Layer. Received: "
            f"model={model!r}. Pass the model, before or after it is compiled."
        )
    tree = _tree(model)
    if isinstance(layers, str):
        if layers != "blocks":
            raise ArgumentError(
                '`layers` must be "blocks", or a list of names or layers. Received: '
                f"layers={layers!r}. For one layer, pass a list: layers=[{layers!r}]."
            )
        selected = _blocks(model)
    else:
        selected = _named(tree, list(layers))
    ids = {id(layer) for layer in selected}
    before = {id(call.layer) for call in _keras.recomputed_calls(model)}
    for layer, _ in tree:
        if (id(layer) in ids) != (id(layer) in before):
            _keras.set_recomputed(layer, id(layer) in ids)
    # A function that is traced already would still use the earlier choice.
    if ids != before and isinstance(model, keras.Model):
        model.train_function = None  # Keras traces it again
    paths = {id(layer): path for layer, path in reversed(tree)}
    return Recomputation(
        tuple(paths[id(layer)] for layer in selected),
        tuple(type(layer).__name__ for layer in selected),
    )


def _tree(model: Any, path: str = "") -> list[tuple[Any, str]]:
    """Lists the layers below a model, each with its path."""
    layers: list[tuple[Any, str]] = []
    for layer in _keras.sublayers(model):
        below = f"{path}/{layer.name}" if path else layer.name
        layers += [(layer, below), *_tree(layer, below)]
    return layers


def _named(tree: Sequence[tuple[Any, str]], names_or_layers: Sequence[Any]) -> list[Any]:
    selected: dict[int, Any] = {}
    for name in names_or_layers:
        matching = [
            layer for layer, path in tree if name is layer or name in (layer.name, path)
        ]
        if not matching:
            names = sorted({layer.name for layer, _ in tree})
            close = difflib.get_close_matches(str(name), names) or names[:5]
            raise ArgumentError(
                "`layers` must name layers of the model. Received: "
                f"{name!r}, which is none of them. Names like it: {', '.join(close)}."
            )
        selected.update({id(layer): layer for layer in matching})
    return list(selected.values())


def _blocks(model: Any) -> list[Any]:
    """Finds the blocks of a model.

    Raises:
        ArgumentError: There are none.
    """
    blocks = _repeated(model) or _composite(model)
    if not blocks:
        raise ArgumentError(
            'The model must have layers made of layers with layers="blocks". Received: '
            f"model {model.name!r}, whose layers have no parts. Make blocks, such as a "
            "keras.Sequential of some layers, or pass the names of layers."
        )
    return blocks


def _composite(layer: Any) -> list[Any]:
    """Lists the direct sublayers that are made of layers."""
    return [part for part in _keras.sublayers(layer) if _is_composite(part)]


def _is_composite(layer: Any) -> bool:
    # Keras's own layers, such as MultiHeadAttention, are parts of blocks.
    is_layer_of_keras = type(layer).__module__.startswith("keras.src.layers.")
    return bool(_keras.sublayers(layer)) and not is_layer_of_keras


def _kind(layer: Any) -> Any:
    """Describes the classes of a layer and its parts."""
    return (type(layer), *map(_kind, _keras.sublayers(layer)))


def _repeated(layer: Any) -> list[Any]:
    """Lists the parts of which there are several alike, in the largest groups."""
    parts = _composite(layer)
    kinds = [_kind(part) for part in parts]
    counts = Counter(kinds)
    blocks: list[Any] = []
    for part, kind in zip(parts, kinds, strict=True):
        # Blocks may be made of blocks. The level with the most equal parts is taken: while a
        # part is computed again, its activations are in memory, so small parts are better.
        inside = _repeated(part)
        largest = max(Counter(map(_kind, inside)).values(), default=0)
        alone = counts[kind] < 2
        blocks += inside if alone or largest > counts[kind] else [part]
    return blocks
