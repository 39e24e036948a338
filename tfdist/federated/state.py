"""The variables that local steps change, and what a round makes of each kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist import _keras
from tfdist.errors import ArgumentError
from tfdist.step.composition import traced_steps
from tfdist.step.state import optimizers_of, variables_of

Tensor = Any
_SEED_NAME = "seed_generator_state"
# Clients are far apart in the space of seeds, since users seed layers with small numbers.
_SEEDS_APART = 1_000_003
SEEDS_OF_ROUND = 2**20
"""How far a round of protected clients moves seeds, whatever clients have drawn."""


@dataclass(frozen=True)
class LocalState:
    """The `keras.Variable`s that local steps may change.

    Attributes:
        trained: Trainable weights. The server updates them.
        averaged: Statistics of layers in floating point, which are averaged.
        counted: Whole numbers. What clients add to them is summed up.
        metrics: State of metrics, whose changes are summed up.
        optimizers: The optimizers of the model.
        of_optimizers: Their state, without learning rates.
        first: The values of `of_optimizers` in new optimizers; see `_keras.first_values`.
        iterations: The counts of updates among `of_optimizers`.
    """

    trained: tuple[Any, ...]
    averaged: tuple[Any, ...]
    counted: tuple[Any, ...]
    metrics: tuple[Any, ...]
    optimizers: tuple[Any, ...]
    of_optimizers: tuple[Any, ...]
    first: tuple[Any, ...]
    iterations: tuple[Any, ...]

    @property
    def of_model(self) -> tuple[Any, ...]:
        """The variables that each client takes from the server."""
        return self.trained + self.averaged + self.counted

    def check_touched(self, variables: Sequence[Any]) -> None:
        """Checks that a local step has assigned no other variables.

        Args:
            variables: The `keras.Variable`s that it has assigned.

        Raises:
            ArgumentError: It has assigned another one.
        """
        known = {id(v) for v in (*self.of_model, *self.metrics, *self.of_optimizers)}
        for variable in variables:
            if id(variable) not in known:
                raise ArgumentError(
                    "In federated training a local step may assign trainable weights, numbers "
                    "that layers keep as non-trainable weights, metrics and optimizers. "
                    f"Received: a step that assigns {variable.path!r}, of dtype "
                    f"{variable.dtype}. Make it a non-trainable weight of a layer."
                )

    def check_traced(self, step: _keras.TracedPart, protected: bool) -> None:
        """Checks that a local step leaves nothing behind besides this state.

        Args:
            step: A local step. Nothing is known of one without a graph.
            protected: Whether what one client does must not show in the steps of another.

        Raises:
            ArgumentError: It leaves something behind.
        """
        written = step.written((*self.of_model, *self.metrics, *self.of_optimizers))
        if written is not None:
            raise ArgumentError(
                "Federated training must know all that a step changes. Received: a step that "
                f"writes {written!r} of TensorFlow. Make it a non-trainable weight of a layer."
            )
        drawing, python = step.drawing(), step.python()
        if protected and drawing is not None:
            raise ArgumentError(
                "With `privacy` of FedAvg the random numbers of a client must not depend on "
                "the clients before it. Received: a step that draws by TensorFlow's "
                f"{drawing}. Use a function of keras.random with a keras.random.SeedGenerator."
            )
        if protected and python is not None:
            raise ArgumentError(
                "With `privacy` of FedAvg a local step must not call Python code, which may "
                f"remember a client. Received: a step with TensorFlow's {python}. Use "
                "operations of Keras or TensorFlow."
            )
        unseen = step.unseen()
        if protected and unseen is not None:
            raise ArgumentError(
                "With `privacy` of FedAvg a local step must neither keep values for others nor "
                f"bring any in. Received: a step with TensorFlow's operation {unseen}, which "
                "may do so. Use operations of Keras or TensorFlow without such effects."
            )

    def protected(self, model: Any) -> LocalState:
        """Returns the state of a model whose clients are protected as wholes.

        Statistics that no step assigns are left out, such as those of a frozen
        BatchNormalization: they would get noise. All others are a part of the update.

        Args:
            model: The model.

        Raises:
            ArgumentError: The model has state that cannot be protected, or may have it.
        """
        if model.run_eagerly:
            raise ArgumentError(
                "With `privacy` of FedAvg local steps must be traced: Python code that runs in "
                "each step may remember a client. Received: a model that was compiled with "
                "run_eagerly=True. Compile it without."
            )
        for layer in _keras.layers_of(model):
            if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable:
                raise ArgumentError(
                    "With `privacy` of FedAvg no layer may keep a variance, which noise could "
                    f"make negative. Received: the BatchNormalization {layer.name!r}. Use "
                    "GroupNormalization or LayerNormalization, or freeze the layer."
                )
            if isinstance(layer, keras.layers.SpectralNormalization) and layer.trainable:
                raise ArgumentError(
                    "With `privacy` of FedAvg no layer may rewrite its kernel when it is "
                    "called, which noise would not fit. Received: the SpectralNormalization "
                    f"{layer.name!r}. Use a `kernel_constraint`."
                )
        for variable in self.trained:
            if not tf.as_dtype(variable.dtype).is_floating:
                raise ArgumentError(
                    "With `privacy` of FedAvg trained weights must be real numbers. Received: "
                    f"{variable.path!r} of dtype {variable.dtype}. Keep its real and imaginary "
                    "parts as two weights, or freeze it."
                )
        counts = [v.path for v in self.counted if not _is_seed(v)]
        if counts:
            raise ArgumentError(
                "With `privacy` of FedAvg no layer may count in whole numbers: the sum over "
                f"clients has no noise. Received: {counts[0]!r}. Leave the layer out."
            )
        owned = {id(v) for v in (*model.weights, *self.of_optimizers)}
        held = [v.path for v in self.metrics if id(v) in owned]
        if held:
            raise ArgumentError(
                "With `privacy` of FedAvg no metric may hold a weight of the model or of an "
                f"optimizer: metrics have no noise. Received: {held[0]!r}. Leave it out."
            )
        assigned = {id(v) for step in traced_steps(model) for v in step.assigned}
        return replace(self, averaged=tuple(v for v in self.averaged if id(v) in assigned))

    def seeds_of(self, stream: Tensor, values: Sequence[Tensor]) -> list[Tensor]:
        """Gives a client's first values of `counted`: seeds of its own, other numbers as are.

        Args:
            stream: The number of the client's random numbers, scalar int64.
            values: The values of `counted`.
        """
        return [
            value + tf.cast(tf.stack([stream * _SEEDS_APART, 0]), value.dtype)
            if _is_seed(variable)
            else value
            for variable, value in zip(self.counted, values, strict=True)
        ]


def _is_seed(variable: Any) -> bool:
    return bool(variable.name == _SEED_NAME and tuple(variable.shape) == (2,))


def state_of(model: Any) -> LocalState:
    """Finds the state that local steps change.

    Args:
        model: A compiled, built `keras.Model`.

    Raises:
        ArgumentError: An optimizer cannot be made anew; see `_keras.first_values`.
    """
    optimizers = optimizers_of(model)
    rates = {id(rate) for rate in _keras.rates_of(optimizers)}
    first: dict[int, tuple[Any, Any]] = {}
    for optimizer in filter(lambda o: o.built, optimizers):
        values = _keras.first_values(optimizer)
        pairs = zip(optimizer.variables, values, strict=True)
        first |= {id(v): (v, value) for v, value in pairs if id(v) not in rates}
    trained = tuple(model.trainable_variables)
    metrics = tuple(_keras.metric_variables(model))
    others = {*first, *rates, *(id(v) for v in (*trained, *metrics))}
    assigned = [v for step in traced_steps(model) for v in step.assigned]
    kept = {id(v): v for v in [*_keras.statistics_of(model), *assigned]}
    kept |= {id(v): v for v in variables_of(model) if v.name == _SEED_NAME}
    kept = {key: v for key, v in kept.items() if key not in others}
    types = {key: tf.as_dtype(v.dtype) for key, v in kept.items()}
    return LocalState(
        trained,
        tuple(v for key, v in kept.items() if types[key].is_floating),
        tuple(v for key, v in kept.items() if types[key].is_integer),
        metrics,
        tuple(optimizers),
        tuple(variable for variable, _ in first.values()),
        tuple(np.asarray(value) for _, value in first.values()),
        tuple(_keras.iterations_of(o) for o in optimizers),
    )
