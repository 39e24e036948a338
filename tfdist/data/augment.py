"""Augmentation in the input road: a function of the seed, the step and the place in it."""

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
    """Changes examples at random while `fit` draws them; its `augment` argument.

    What becomes of an example is a function of the seed, the step and its place in the global
    batch, whatever the number of replicas; every example has numbers of its own, also from
    layers such as `RandomCrop` that decide once for a batch. Targets and weights stay as they
    are, and nothing but training data is changed.

    Args:
        layers: A Keras layer or several, applied in turn: those of Keras's image augmentation,
            noise layers, or layers of your own that draw by `keras.random` from a
            `SeedGenerator`. Each takes and gives one tensor, and treats examples one by one.
            For `x` that is a dict, a dict of layers by the name of the input.
        classes: The classes to change, as `y` names them: values, or columns where `y` has
            shape [examples, classes]. All if None.
        repeated: Change an example that the sampler draws r times an epoch with probability
            1 - 1/r, so that it is seen as it is once an epoch, on average. For arrays.

    Raises:
        ArgumentError: There is no layer, or one that is not a Keras layer.

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
        """The layers of each input, that of a single one under None."""
        if isinstance(self.layers, dict):
            return {name: _listed(layers) for name, layers in self.layers.items()}
        return {None: _listed(self.layers)}

    def check(self, y: Any) -> None:
        """Refuses targets that `classes` cannot be looked up in.

        Args:
            y: What has their shape and dtype.

        Raises:
            ArgumentError: There are no targets, several, or of another kind.
        """
        if y is None or tf.nest.is_nested(y) or y.shape.rank not in (1, 2):
            raise ArgumentError(
                "`classes` needs one target for each example. Received: "
                f"y={shortened(y)}. Leave `classes` out, or pass y of shape [examples]."
            )
        wanted = np.asarray(self.classes)
        if _has_columns(y):
            if wanted.dtype.kind not in "iu" or not set(wanted) <= set(range(y.shape[1])):
                raise ArgumentError(
                    "`classes` must be columns of `y`. Received: "
                    f"classes={self.classes!r} and y with shape {tuple(y.shape)}."
                )
        elif (wanted.dtype.kind in "US") != (y.dtype == tf.string):
            raise ArgumentError(
                "`classes` must be of the kind of `y`. Received: "
                f"classes={self.classes!r} and y of dtype {y.dtype.name}."
            )

    def chosen(self, y: Any) -> Any:
        """Says which examples are of `classes`.

        Args:
            y: Targets of shape [examples] or [examples, 1], or [examples, classes].

        Returns:
            Boolean tensor of shape [examples].
        """
        if _has_columns(y):
            columns = tf.gather(y, list(self.classes or ()), axis=1)
            return tf.reduce_any(tf.cast(columns, tf.float32) > 0.5, 1)
        wanted = tf.cast(np.asarray(self.classes), y.dtype)
        return tf.reduce_any(tf.reshape(y, [-1, 1]) == wanted, 1)


def _has_columns(y: Any) -> bool:
    return bool(y.shape.rank == 2 and y.shape[1] != 1)


def _listed(layers: Any) -> list[Any]:
    return list(layers) if isinstance(layers, list | tuple) else [layers]
