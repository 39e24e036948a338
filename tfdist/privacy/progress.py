"""How far a private training has come, and which noise its steps get."""

from __future__ import annotations

import secrets
from typing import Any, Protocol

import keras

from tfdist import _keras
from tfdist.errors import ArgumentError
from tfdist.privacy.dpftrl import DPFTRL
from tfdist.privacy.mechanism.step import PrivateStep
from tfdist.privacy.settings import DPSGD


class Listener(Protocol):
    """What wants to hear of a training's progress."""

    def before_steps(self, steps: int) -> None:
        """Called before steps are made.

        Args:
            steps: Of this training, these included.
        """

    def begun(self) -> None:
        """Called when all callbacks have begun: they may have restored the model."""


class StepProgress:
    """Counts the steps of a private training, and says which noise they get.

    The count is a `StepCounter`'s. What a user or a callback does to the optimizer does not
    matter to it.

    Args:
        model: A compiled `keras.Model`.
        privacy: The settings.

    Attributes:
        correlated: Whether steps take back noise of steps before, so that it must go on.
        kept: Steps of this run that are not this process's.
        counted_from: The place in a schedule of the first step that `steps_made` counts.
    """

    def __init__(self, model: Any, privacy: DPSGD) -> None:
        self.correlated = isinstance(privacy, DPFTRL)
        self.kept = self.counted_from = 0
        self._model = model
        self._seed = privacy.seed
        # From which step on which secret makes the noise.
        self._secrets = [(0, self._new_secret())]
        self._first = 0
        self._earlier = 0
        self._step: PrivateStep | None = None
        self._seen = 0

    def _new_secret(self) -> int:
        return secrets.randbits(127) if self._seed is None else self._seed

    @property
    def iterations(self) -> int:
        """Steps that the optimizer says it has made."""
        return int(self._model.optimizer.iterations.numpy())

    @property
    def made_here(self) -> int:
        """Steps that this process has made."""
        return self._earlier + (0 if self._step is None else self._step.counter.steps)

    @property
    def steps_made(self) -> int:
        """Steps of this run, so without those of processes that a checkpoint is of."""
        return self.kept + self.made_here

    @property
    def position(self) -> int:
        """Steps of this training, those included that a checkpoint has."""
        return self._first + self.steps_made

    def go_on(self, saved: dict[str, Any] | None, kept: int, bands: int) -> dict[str, Any]:
        """Goes on with a training.

        What the steps before have added is taken back with their secret. Steps to come get a
        new one: they may be others than an earlier process made and lost, and the same noise
        on both would cancel in their difference.

        Args:
            saved: What an earlier process got from this method, or None.
            kept: Steps that are in the weights.
            bands: Of how many steps the noise of one is made.

        Returns:
            What is to be saved, plain data.
        """
        self._first = self.counted_from = kept
        if saved is not None:
            known = [(int(begin), int(secret)) for begin, secret in saved["secrets"]]
            known = [(begin, secret) for begin, secret in known if begin < kept]
            needed = [
                pair
                for pair, following in zip(known, [*known[1:], (kept, 0)], strict=True)
                if following[0] > kept - bands + 1
            ]
            self._secrets = [*needed, (kept, self._new_secret())]
        return {"secrets": [[begin, str(secret)] for begin, secret in self._secrets]}

    @property
    def place(self) -> int:
        """Where in a schedule this process begins: the steps that are in the weights."""
        return self._first + max(0, self.moved(), self.kept)

    def begin_at(self, place: int) -> None:
        """Sets where in a schedule this process begins.

        Args:
            place: As in `place`, the same on all workers.
        """
        self.counted_from = place - self.kept
        if self._step is not None:
            self._step.counter.count_from(place + self._earlier)

    def settle(self, made_here: int) -> None:
        """Takes the number of steps that all workers have agreed on.

        Args:
            made_here: Before the step function runs again.
        """
        self._earlier = made_here

    def restart(self, step: PrivateStep) -> None:
        """Gives a step new noise, or that which goes on; what was made before stays counted.

        Args:
            step: What will be made.
        """
        if (
            self._step is not None
        ):  # an elastic run goes on: what broke off is not in the weights
            self._earlier += self._step.counter.finished
        self._step = step
        step.restart(self._seed, self._first, self._secrets if self.correlated else None)
        self.look()

    def number_by_optimizer(self) -> None:
        """Lets noise that is known anyway depend on the optimizer's count, to be repeatable."""
        if self._seed is not None and not self.correlated and self._step is not None:
            self._step.counter.number_from(self.iterations)

    def look(self) -> None:
        """Notes how far the optimizer is."""
        self._seen = self.iterations

    def moved(self) -> int:
        """Tells how far callbacks have moved the optimizer since `look`."""
        return self.iterations - self._seen

    def check_unmoved(self) -> None:
        """Refuses weights of another step: noise would be taken back that is not in them.

        Raises:
            ArgumentError: A callback has moved the optimizer.
        """
        if self.correlated and self.moved():
            raise ArgumentError(
                "No callback may set the optimizer's `iterations` with DPFTRL: the noise that "
                "a step takes back must be in the weights. Received: "
                f"{self.iterations} in place of {self._seen}. "
                "To go on after an interruption use fit(checkpoint=...)."
            )


def watched(callbacks: Any, progress: StepProgress, listener: Listener, *others: Any) -> Any:
    """Adds to the callbacks what keeps count.

    Args:
        callbacks: A list of callbacks, or a `CallbackList`.
        progress: Of the training.
        listener: Told of it.
        *others: Callbacks that come first as well.
    """
    first = [_First(progress, listener), *others]
    return _keras.around(callbacks, first, [_Last(progress, listener)])


class _First(keras.callbacks.Callback):  # type: ignore[misc]
    """Comes before all other callbacks, and sees what they have not yet moved."""

    def __init__(self, progress: StepProgress, listener: Listener) -> None:
        super().__init__()
        self._progress, self._listener = progress, listener
        self._asked = 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._asked = self._progress.steps_made

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        # Without reading the count: that would wait for the device.
        self._asked += int(self.model.steps_per_execution)
        self._listener.before_steps(self._asked)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._progress.look()


class _Last(keras.callbacks.Callback):  # type: ignore[misc]
    """Comes after all other callbacks, and sees what they have restored."""

    def __init__(self, progress: StepProgress, listener: Listener) -> None:
        super().__init__()
        self._progress, self._listener = progress, listener

    def on_train_begin(self, logs: Any = None) -> None:
        self._progress.check_unmoved()
        self._listener.begun()
        self._progress.number_by_optimizer()
        self._progress.look()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._progress.check_unmoved()
