"""Calls `fit` on a model, records the gradients that its optimizer gets, and restores it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from tfdist import _keras, api
from tfdist._keras import layers as keras_layers
from tfdist.privacy import model_history
from tfdist.privacy.sampling.poisson import Poisson
from tfdist.samplers import Rows, Sampler

Floats = NDArray[np.float32]
Consume = Callable[[int, Floats], None]
_OURS = "_tfdist"
_OF_KERAS = (
    "optimizer",
    "steps_per_execution",
    "stop_training",
    "history",
    "train_function",
    "test_function",
    "predict_function",
)


class GradientRecorder(keras.optimizers.Optimizer):  # type: ignore[misc]
    """Records the gradients of the last step, and does not change the weights."""

    def __init__(self) -> None:
        super().__init__(learning_rate=1.0, name="tfdist_gradient_recorder")

    def build(self, variables: Any) -> None:
        """Adds a variable for the gradient of each variable."""
        if self.built:
            return
        super().build(variables)
        self.gradients = [
            self.add_variable_from_reference(v, name="gradient", initializer="zeros")
            for v in variables
        ]

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Records a gradient."""
        recorded = self.gradients[keras_layers.index_of(self, variable)]
        self.assign(recorded, keras.ops.cast(gradient, recorded.dtype))


@dataclass(frozen=True)
class Planned(Poisson):
    """Draws planned rows. Steps after the plan have empty batches.

    Args:
        plan: The numbers of rows, or of users, for each step.
    """

    draws_as_accounted = True  # as far as the check is concerned: it plans which rows are drawn
    plan: tuple[tuple[int, ...], ...] = ()

    def bind(self, targets: Any, num_rows: int) -> Sampler:
        """Sets the capacity to all rows; see `Sampler.bind`."""
        return Planned(num_rows, self.plan)

    def rows(self, step: int, *, num_rows: int, batch_size: float, seed: int) -> Rows:
        """Returns the planned rows; see `Sampler.rows`."""
        return np.array(self.plan[step] if step < len(self.plan) else (), np.int64)


class _Reader(keras.callbacks.Callback):  # type: ignore[misc]
    def __init__(self, optimizer: GradientRecorder, consume: Consume) -> None:
        super().__init__()
        self._optimizer, self._consume = optimizer, consume
        self.logs: list[dict[str, float]] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        gradients = [
            np.asarray(keras.ops.convert_to_numpy(v), np.float32).ravel()
            for v in self._optimizer.gradients
        ]
        self._consume(len(self.logs), np.concatenate(gradients))
        self.logs.append({name: float(value) for name, value in (logs or {}).items()})


class Subject:
    """A measured model. `subject_of` makes it.

    Args:
        model: A compiled `keras.Model`.
        strategy: As in `fit`.
    """

    def __init__(self, model: Any, strategy: Any) -> None:
        self.model = model
        self._strategy = strategy
        self._recorder = GradientRecorder()
        vars(model)["optimizer"] = self._recorder
        vars(model)["steps_per_execution"] = 1
        self._state: list[tuple[Any, Any]] | None = None

    @property
    def weights(self) -> list[Any]:
        """The variables that are trained, in the order of recorded gradients."""
        return list(self.model.trainable_variables)

    def fit(
        self, columns: Sequence[Any], consume: Consume, **options: Any
    ) -> list[dict[str, float]]:
        """Trains as a user would, and passes on each step's gradient.

        Args:
            columns: `x`, `y` and `sample_weight`.
            consume: Called with the number of each step and its concatenated gradients.
            **options: Options of `tfdist.fit`.

        Returns:
            The logs of each step.
        """
        x, y, weight = columns
        if self._recorder.built:
            self._recorder.iterations.assign(0)
        reader = _Reader(self._recorder, consume)
        api.fit(
            self.model,
            x,
            y,
            sample_weight=weight,
            verbose=0,
            strategy=self._strategy,
            callbacks=[reader],
            verify_every=0,
            **options,
        )
        return reader.logs

    def rewind(self) -> None:
        """Restores the first state of the model's random numbers and metrics."""
        if self._state is None and self.model.built:
            self._state = _state_of(self.model)
        for variable, value in self._state or ():
            variable.assign(value)


def _state_of(model: Any) -> list[tuple[Any, Any]]:
    variables = [*model.variables, *_keras.metric_variables(model)]
    if _keras.has_global_seed():
        variables.append(_keras.global_seed_variable())
    unique = {id(v): v for v in variables}.values()
    return [(v, np.array(keras.ops.convert_to_numpy(v))) for v in unique]


@contextlib.contextmanager
def subject_of(model: Any, strategy: Any) -> Iterator[Subject]:
    """Prepares a model for measurements, and restores it afterwards.

    Args:
        model: A compiled `keras.Model`. It is built if it was not.
        strategy: As in `fit`.
    """
    attributes = vars(model)
    attributes_before = {
        n: v for n, v in attributes.items() if n in _OF_KERAS or n.startswith(_OURS)
    }
    state = _state_of(model) if model.built else []
    for name in attributes_before:
        if name.startswith(_OURS):
            del attributes[name]
    with _keras.keeping_random_state(), model_history.forgotten(model):
        try:
            yield Subject(model, strategy)
        finally:
            for name in list(attributes):
                if name.startswith(_OURS) or (
                    name in _OF_KERAS and name not in attributes_before
                ):
                    del attributes[name]
            attributes.update(attributes_before)
            for variable, value in state:
                variable.assign(value)
