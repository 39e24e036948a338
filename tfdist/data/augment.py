"""Augmentation: a function of the seed, the step and an example's position in the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist.data.source import shortened
from tfdist.errors import ArgumentError

Tensor = Any


@dataclass(frozen=True, eq=False)
class Augment:
    """Augmentation of the training data; the `augment` argument of `fit`.

    The change of an example is a function of the seed, the step and the example's position in
    the global batch. It does not depend on the number of replicas. Every example gets its own
    random numbers, even from layers such as `RandomCrop` that draw once for a batch. Targets,
    weights and validation data do not change.

    Args:
        layers: A Keras layer or a list of layers, applied one after the other: Keras's image
            augmentation layers, noise layers, or your own layers that use `keras.random` with
            a `SeedGenerator`. Each layer takes and returns one tensor, and changes each
            example independently. If `x` is a dict, a dict of layers by the input's name.
        classes: The classes to change, as in `y`: values, or columns if `y` has shape
            [examples, classes]. None for all classes.
        repeated: If the sampler draws an example r times an epoch, change it with probability
            1 - 1/r: on average it comes unchanged once an epoch. For arrays only.

    Raises:
        ArgumentError: There is no layer, or a layer is not a Keras layer.

    Example:
        >>> import keras, numpy as np, tfdist
        >>> x, y = np.ones((8, 6, 6, 1), "float32"), np.array([0, 0, 0, 0, 0, 0, 0, 1])
        >>> model = keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(2)])
        >>> loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        >>> model.compile("sgd", loss)
        >>> augment = tfdist.Augment([keras.layers.RandomRotation(0.1)], repeated=True)
        >>> history = tfdist.fit(
        ...     model, x, y, sampler=tfdist.samplers.ClassBalanced(), augment=augment, verbose=0
        ... )
    """

    layers: Any
    classes: Sequence[Any] | None = None
    repeated: bool = False

    def __post_init__(self) -> None:
        lists = self.by_input.values()
        for layer in (layer for layers in lists for layer in layers):
            if not isinstance(layer, keras.Layer):
                raise ArgumentError(
                    "`layers` must be Keras layers. Received: a layer of type "
                    f"{type(layer).__name__}. Wrap a function in keras.layers.Lambda."
                )
        if not lists or not all(lists):
            raise ArgumentError(
                f"`layers` must have a layer. Received: layers={shortened(self.layers)}."
            )
        if self.classes is not None and (
            isinstance(self.classes, str | bytes) or not len(np.atleast_1d(self.classes))
        ):
            raise ArgumentError(
                "`classes` must be a list of classes, or None for all. Received: "
                f"classes={self.classes!r}."
            )

    @property
    def by_input(self) -> dict[str | None, list[Any]]:
        """The layers of each input by its name; the name of a single input is None."""
        if isinstance(self.layers, dict):
            return {name: _listed(layers) for name, layers in self.layers.items()}
        return {None: _listed(self.layers)}

    def check(self, y: Any) -> None:
        """Refuses targets that do not fit `classes`.

        Args:
            y: The targets, or a description with their shape and dtype.

        Raises:
            ArgumentError: There are no targets, several targets, or targets of another kind.
        """
        if y is None or tf.nest.is_nested(y) or y.shape.rank not in (1, 2):
            raise ArgumentError(
                "`classes` needs one target for each example. Received: "
                f"y={shortened(y)}. Leave `classes` out, or pass y of shape [examples]."
            )
        chosen_classes = np.asarray(self.classes)
        if _has_columns(y):
            if chosen_classes.dtype.kind not in "iu" or not set(chosen_classes) <= set(
                range(y.shape[1])
            ):
                raise ArgumentError(
                    "`classes` must be columns of `y`. Received: "
                    f"classes={self.classes!r} and y with shape {tuple(y.shape)}."
                )
        elif (chosen_classes.dtype.kind in "US") != (y.dtype == tf.string):
            raise ArgumentError(
                "`classes` must be of the kind of `y`. Received: "
                f"classes={self.classes!r} and y of dtype {y.dtype.name}."
            )

    def chosen(self, y: Any) -> Any:
        """Finds the examples of `classes`.

        Args:
            y: Targets of shape [examples] or [examples, 1], or [examples, classes].

        Returns:
            Boolean tensor of shape [examples].
        """
        if _has_columns(y):
            columns = tf.gather(y, list(self.classes or ()), axis=1)
            return tf.reduce_any(tf.cast(columns, tf.float32) > 0.5, 1)
        chosen_classes = tf.cast(np.asarray(self.classes), y.dtype)
        return tf.reduce_any(tf.reshape(y, [-1, 1]) == chosen_classes, 1)


def _has_columns(y: Any) -> bool:
    return bool(y.shape.rank == 2 and y.shape[1] != 1)


def _listed(layers: Any) -> list[Any]:
    return list(layers) if isinstance(layers, list | tuple) else [layers]
