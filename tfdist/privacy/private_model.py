"""Replaces layers that mix examples, for private training."""

from __future__ import annotations

from typing import Any

import keras
from keras import layers

from tfdist import _keras
from tfdist._keras import layers as keras_layers
from tfdist.errors import ArgumentError
from tfdist.privacy import model_history

_MOST_GROUPS = 32
_LEAST_CHANNELS = 4


def make_private_model(model: Any) -> tuple[Any, list[str]]:
    """Replaces BatchNormalization, which mixes the examples of a batch, by GroupNormalization.

    Group normalization (Wu and He, "Group normalization", ECCV 2018) computes its statistics
    from one example alone. Channels are split into at most 32 groups of at least 4 channels.
    All other layers keep their weights. The new layers have initial weights, so a trained model
    needs more training. The new model has the privacy that was spent on the old one.

    Args:
        model: A built Sequential or functional `keras.Model`, compiled or not. It does not
            change.

    Returns:
        A new model, compiled like `model`, and a line for each replaced layer.

    Raises:
        ArgumentError: The model is subclassed, so that its layers cannot be replaced from
            outside, or it is not built.

    Example:
        >>> import keras, tfdist
        >>> model = keras.Sequential(
        ...     [keras.Input((8,)), keras.layers.BatchNormalization(name="norm")]
        ... )
        >>> private, changed = tfdist.privacy.make_private_model(model)
        >>> changed
        ['norm: BatchNormalization became GroupNormalization(groups=2)']
    """
    if not keras_layers.is_graph_of_layers(model):
        raise ArgumentError(
            "`model` must be a Sequential or functional model. Received: model of type "
            f"{type(model).__name__}, whose layers only its class can replace. Use "
            "keras.layers.GroupNormalization in the class."
        )
    if not model.built:
        raise ArgumentError(
            "`model` must be built. Received: a model without an input shape. Begin it with "
            "keras.Input(shape)."
        )
    replacements: list[str] = []

    def replace(layer: Any) -> Any:
        if keras_layers.is_graph_of_layers(layer):
            return clone(layer)
        if not isinstance(layer, layers.BatchNormalization):
            return layer.__class__.from_config(layer.get_config())
        channels = int(layer.moving_mean.shape[0])
        groups = _groups(channels)
        replacements.append(
            f"{layer.name}: BatchNormalization became GroupNormalization(groups={groups})"
        )
        return layers.GroupNormalization(
            groups,
            axis=layer.axis,
            epsilon=layer.epsilon,
            center=layer.center,
            scale=layer.scale,
            beta_regularizer=layer.beta_regularizer,
            gamma_regularizer=layer.gamma_regularizer,
            name=layer.name,
            dtype=layer.dtype_policy,
        )

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(layer, layers.GroupNormalization):
            return layer(*args)  # it accepts neither `training` nor `mask`
        return layer(*args, **kwargs)

    def clone(graph: Any) -> Any:
        # `clone_model` does not call the layers of a Sequential model.
        options = {} if isinstance(graph, keras.Sequential) else {"call_function": call}
        return keras.models.clone_model(graph, clone_function=replace, **options)

    private_model = clone(model)
    pairs = zip(_keras.layers_of(model), _keras.layers_of(private_model), strict=True)
    for old, new in pairs:
        inner = _keras.layers_of(old)[1:]
        # Layers that were replaced have other weights. Layers with inner ones get theirs from
        # these.
        if type(old) is type(new) and not inner:
            new.set_weights(old.get_weights())
            new.trainable = old.trainable
    if model.compiled:
        private_model.compile_from_config(model.get_compile_config())
    model_history.pass_on(model, private_model)
    return private_model, replacements


def _groups(channels: int) -> int:
    """Returns the largest allowed number of groups that divides the channels."""
    possible = range(min(_MOST_GROUPS, channels // _LEAST_CHANNELS), 0, -1)
    return next((groups for groups in possible if channels % groups == 0), 1)
