"""Layers whose whole weights are freed after the forward pass, and gathered again.

A layer of Keras's without parts is called a second time in the backward pass (`recomputation`),
with weights that are gathered then. TensorFlow drops what the second call computes and its
gradient does not need, so a matrix product is not computed again. The gradients of the weights
are summed over replicas right there, and each replica keeps its part.

So do layers and blocks that `tfdist.recompute` has chosen, with the weights of all their parts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.common import global_state as _global_state

from tfdist._keras.replica import Tensor, current_batch
from tfdist._keras.sharded_weights import InParts, gathered


@dataclass(frozen=True)
class LayerWeights:
    """The weights in parts of a layer that is being called.

    Attributes:
        variables: The `keras.Variable`s.
        backings: What backs them.
    """

    variables: tuple[Any, ...] = ()
    backings: tuple[InParts, ...] = ()

    @property
    def ids(self) -> list[int]:
        """The ids of the `keras.Variable`s."""
        return list(map(id, self.variables))

    @classmethod
    def of(cls, layer: Any) -> LayerWeights:
        """Returns those of a layer and its parts, if they can be gathered for the call alone.

        Args:
            layer: A `keras.Layer`, in a step.
        """
        batch = current_batch()
        if batch is None or not batch.is_outermost or batch.is_updating:
            return cls()
        if _global_state.get_global_attribute("stateless_scope") is not None:
            return cls()  # a layer around it has gathered them
        weights = {
            id(variable): variable
            for part in layer._flatten_layers()
            for variable in part._trainable_variables
            if isinstance(variable._value, InParts)
        }
        return cls(tuple(weights.values()), tuple(v._value for v in weights.values()))

    def gathered_after(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Gathers the whole weights when some tensors are available.

        Args:
            tensors: The layer's arguments, or the gradients of its results.
        """
        if not self.backings:
            return []
        with tf.control_dependencies(tensors):
            return gathered(self.backings)

    def note(self, wholes: Sequence[Tensor]) -> None:
        """Lets tapes know that whole weights are values of the variables.

        Args:
            wholes: The result of `gathered_after`.
        """
        batch = current_batch()
        if batch is None:  # nothing is in parts
            return
        for backing, whole in zip(self.backings, wholes, strict=True):
            batch.reads.setdefault(id(backing), []).append(whole)

    @contextlib.contextmanager
    def used(self, wholes: Sequence[Tensor]) -> Iterator[None]:
        """Makes a context in which the weights have some whole values.

        Args:
            wholes: The result of `gathered_after`.
        """
        batch = current_batch()
        if batch is None or not self.backings:
            yield
            return
        before = dict(batch.gathered)
        batch.gathered.update({id(b): w for b, w in zip(self.backings, wholes, strict=True)})
        yield
        for backing in self.backings:
            batch.gathered.pop(id(backing), None)
        batch.gathered.update(before)

    def scattered(self, gradients: Sequence[Any]) -> list[Any]:
        """Returns this replica's parts of the summed gradients, where the optimizer takes them.

        Args:
            gradients: Those of the whole weights.
        """
        results, batch = list(gradients), current_batch()
        if batch is None or not batch.is_weighed:
            return results
        chosen = [
            i
            for i, (gradient, variable) in enumerate(zip(results, self.variables, strict=True))
            if isinstance(gradient, tf.Tensor)
            and self.backings[i].gathering.takes_parts(variable)
        ]
        if chosen:
            cuts = [self.backings[i].cut for i in chosen]
            gathering = self.backings[0].gathering
            parts = gathering.scatter(cuts, [results[i] for i in chosen])
            for i, part in zip(chosen, parts, strict=True):
                results[i] = part
        return results


def frees_weights(layer: Any) -> bool:
    """Tells whether a layer's whole weights can be freed after its forward pass.

    Args:
        layer: A built `keras.Layer`.
    """
    has_weights = any(isinstance(v._value, InParts) for v in layer._trainable_variables)
    # An embedding's gradient does not need the table.
    is_table = isinstance(layer, keras.layers.Embedding)
    is_kerases = type(layer).call.__module__.partition(".")[0] == "keras"
    is_leaf = len(list(layer._flatten_layers())) == 1
    return has_weights and is_leaf and is_kerases and not is_table
