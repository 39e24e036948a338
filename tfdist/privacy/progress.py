"""The progress of a private training, and the noise of its steps."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any, Protocol

import keras

from tfdist import _keras
from tfdist.errors import ArgumentError
from tfdist.privacy.client_dp import ClientDP
from tfdist.privacy.client_dpftrl import ClientDPFTRL
from tfdist.privacy.dpftrl import DPFTRL
from tfdist.privacy.mechanism.counter import StepCounter
from tfdist.privacy.settings import DPSGD


class Listener(Protocol):
    """An object that is told of a training's progress."""

    def before_steps(self, steps: int) -> None:
        """Called before steps are made.

        Args:
            steps: The number of steps of this training after the coming ones.
        """

    def callbacks_began(self) -> None:
        """Called after all callbacks have begun. They may have restored the model."""


class CountedStep(Protocol):
    """A private step, which counts how often it is made."""

    counter: StepCounter

    def restart(
        self, seed: int | None, first: int, correlated: Sequence[tuple[int, int]] | None
    ) -> None:
        """Begins a `fit`; see `PrivateStep.restart`."""


class StepProgress:
    """Counts the steps of a private training, and chooses their noise.

    A `StepCounter` counts the steps, whatever users and callbacks do to the optimizer's count.

    Args:
        model: A compiled `keras.Model`.
        privacy: The settings.
        updates: How far a step moves the optimizer's count.

    Attributes:
        correlated: Whether a step subtracts noise of steps before it.
        restored_steps: The number of steps of this run that another process has made.
        counted_from: The place in a schedule of the first step that `steps_made` counts.
        unrecorded: The part of `moved` that no record calls private.
        updates: The argument `updates`.
    """

    def __init__(self, model: Any, privacy: DPSGD | ClientDP, updates: int = 1) -> None:
        self.correlated = isinstance(privacy, DPFTRL | ClientDPFTRL)
        self.restored_steps = self.counted_from = self.unrecorded = 0
        self._model = model
        self.updates = updates
        self._seed = privacy.seed
        # Pairs of a step and the secret of the noise from this step on.
        self._secrets = [(0, self._new_secret())]
        self._first = 0
        self._steps_before_step = 0
        self._step: CountedStep | None = None
        self._last_iterations = 0

    def _new_secret(self) -> int:
        return secrets.randbits(127) if self._seed is None else self._seed

    @property
    def iterations(self) -> int:
        """The steps that the optimizer has counted."""
        return int(self._model.optimizer.iterations.numpy()) // self.updates

    @property
    def process_steps(self) -> int:
        """The number of steps that this process has made."""
        return self._steps_before_step + (0 if self._step is None else self._step.counter.steps)

    @property
    def steps_made(self) -> int:
        """The number of steps of this run, without those of earlier runs in a checkpoint."""
        return self.restored_steps + self.process_steps

    @property
    def position(self) -> int:
        """The number of steps of this training, with those of earlier runs in a checkpoint."""
        return self._first + self.steps_made

    def go_on(
        self, saved: dict[str, Any] | None, steps_in_weights: int, bands: int
    ) -> dict[str, Any]:
        """Continues a training.

        The noise of steps in the weights is subtracted with the secrets that made it. New steps
        get a new secret. An earlier process may have made other steps with the same numbers,
        and lost them. With equal noise on both, the noise would cancel in their difference.

        Args:
            saved: The return value of this method in an earlier process, or None.
            steps_in_weights: The number of steps in the weights.
            bands: The number of steps whose noise a step combines.

        Returns:
            Plain data to be saved.
        """
        self._first = self.counted_from = steps_in_weights
        if saved is not None:
            pairs = [(int(begin), int(secret)) for begin, secret in saved["secrets"]]
            pairs = [(begin, secret) for begin, secret in pairs if begin < steps_in_weights]
            # Secrets of steps that no coming step reaches back to are dropped.
            reachable = [
                pair
                for pair, following in zip(
                    pairs, [*pairs[1:], (steps_in_weights, 0)], strict=True
                )
                if following[0] > steps_in_weights - bands + 1
            ]
            self._secrets = [*reachable, (steps_in_weights, self._new_secret())]
        return {"secrets": [[begin, str(secret)] for begin, secret in self._secrets]}

    @property
    def place(self) -> int:
        """The place in a schedule at which this process begins: the steps in the weights."""
        recorded = self.moved() - self.unrecorded // self.updates
        return self._first + max(0, recorded, self.restored_steps)

    def begin_at(self, place: int) -> None:
        """Sets the place in a schedule at which this process begins.

        Args:
            place: The value of `place`, equal on all workers.
        """
        self.counted_from = place - self.restored_steps
        if self._step is not None:
            self._step.counter.count_from(place + self._steps_before_step)

    def settle(self, process_steps: int) -> None:
        """Sets the number of steps on which all workers have agreed.

        Args:
            process_steps: The value of `process_steps`, before the step function runs again.
        """
        self._steps_before_step = process_steps

    def restart(self, step: CountedStep) -> None:
        """Sets the noise of a step function. Steps that were made before stay counted.

        Args:
            step: The step function of the coming steps.
        """
        if self._step is not None:
            # An elastic run continues. A step that was interrupted is not in the weights.
            self._steps_before_step += self._step.counter.finished
        self._step = step
        step.restart(self._seed, self._first, self._secrets if self.correlated else None)
        self.look()

    def number_by_optimizer(self) -> None:
        """Makes noise with a known seed repeatable: numbers it by the optimizer's count."""
        if self._seed is not None and not self.correlated and self._step is not None:
            self._step.counter.number_from(self.iterations)

    def look(self) -> None:
        """Reads the optimizer's count."""
        self._last_iterations, self.unrecorded = self.iterations, 0

    def moved(self) -> int:
        """Returns how far callbacks have moved the optimizer's count since `look`."""
        return self.iterations - self._last_iterations

    def check_unmoved(self) -> None:
        """Refuses weights of another step, which do not have the noise that is subtracted.

        Raises:
            ArgumentError: A callback has moved the optimizer.
        """
        if self.correlated and self.moved():
            raise ArgumentError(
                "No callback may set the optimizer's `iterations` with correlated noise: a "
                "step subtracts noise of earlier steps, which must be in the weights. "
                f"Received: iterations={self.iterations} in place of {self._last_iterations}. "
                "To continue after an interruption, use fit(checkpoint=...)."
            )


def watched(callbacks: Any, progress: StepProgress, listener: Listener, *others: Any) -> Any:
    """Adds callbacks that count steps, before and after all other callbacks.

    Args:
        callbacks: A list of callbacks, or a `CallbackList`.
        progress: The progress of the training.
        listener: The object that is told of it.
        *others: Other callbacks that must come first.
    """
    first = [_First(progress, listener), *others]
    return _keras.around(callbacks, first, [_Last(progress, listener)])


class _First(keras.callbacks.Callback):  # type: ignore[misc]
    """Runs before all other callbacks, which may move the optimizer's count."""

    def __init__(self, progress: StepProgress, listener: Listener) -> None:
        super().__init__()
        self._progress, self._listener = progress, listener
        self._announced = 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._announced = self._progress.steps_made

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        # The counter is not read here, which would wait for the device.
        self._announced += int(self.model.steps_per_execution)
        self._listener.before_steps(self._announced)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._progress.look()


class _Last(keras.callbacks.Callback):  # type: ignore[misc]
    """Runs after all other callbacks, which may have restored the model."""

    def __init__(self, progress: StepProgress, listener: Listener) -> None:
        super().__init__()
        self._progress, self._listener = progress, listener

    def on_train_begin(self, logs: Any = None) -> None:
        self._progress.check_unmoved()
        self._listener.callbacks_began()
        self._progress.number_by_optimizer()
        self._progress.look()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._progress.check_unmoved()
