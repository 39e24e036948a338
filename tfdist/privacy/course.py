"""How far a private training has come, and the noise that goes by it."""

from __future__ import annotations

import secrets
from typing import Any

import keras

from tfdist.errors import ArgumentError
from tfdist.privacy.in_turn import DPFTRL
from tfdist.privacy.settings import DPSGD
from tfdist.privacy.step import PrivateStep


class Course:
    """Counts a private `fit`'s steps by the optimizer's, and says which noise they get.

    Args:
        model: A compiled `keras.Model`.
        privacy: The settings.

    Attributes:
        correlated: Whether steps take back noise of steps before, so that it must go on.
    """

    def __init__(self, model: Any, privacy: DPSGD) -> None:
        self.correlated = isinstance(privacy, DPFTRL)
        self._model = model
        self._seed = privacy.seed
        self._secret = secrets.randbits(127) if privacy.seed is None else privacy.seed
        self._noise_begins: int | None = None
        self._start = self._base = self._seen = 0

    @property
    def iterations(self) -> int:
        """Steps that the optimizer has made."""
        return int(self._model.optimizer.iterations.numpy())

    @property
    def steps_made(self) -> int:
        """Steps of this `fit`, those that a backup restored included."""
        return self._base + self.iterations - self._start

    def go_on(self, saved: dict[str, Any] | None) -> dict[str, Any] | None:
        """Takes the noise of an earlier process, of which this one must take parts back.

        Args:
            saved: What it got from this method, or None.

        Returns:
            What is to be saved, plain data, or None.
        """
        if not self.correlated:
            return None
        self._noise_begins = self.iterations
        if saved is not None:
            self._secret, self._noise_begins = int(saved["secret"]), saved["begins"]
        return {"secret": str(self._secret), "begins": self._noise_begins}

    def begin(self) -> None:
        """Begins to count."""
        self._start, self._base = self.iterations, 0
        if self._noise_begins is None:
            self._noise_begins = self._start
        self.look()

    def restart(self, step: PrivateStep) -> None:
        """Gives a step the noise of this `fit`.

        Args:
            step: What will be made.
        """
        assert self._noise_begins is not None
        noise = (self._secret, self._noise_begins) if self.correlated else None
        step.restart(self._seed, noise)
        self.look()

    def note_restored(self) -> None:
        """Counts the steps that callbacks have restored: an earlier process made them."""
        restored = self.iterations - self._start
        self._base += max(0, restored)
        self._start += restored
        self.look()

    def look(self) -> None:
        """Notes how far the optimizer is."""
        self._seen = self.iterations

    def check_unmoved(self) -> None:
        """Refuses an optimizer that a callback has moved: noise must not come twice.

        Raises:
            ArgumentError: Noise goes by the optimizer's steps, and it was moved.
        """
        if self.correlated and self.iterations != self._seen:
            raise ArgumentError(
                "No callback may set the optimizer's `iterations` with DPFTRL, whose noise "
                f"goes by them. Received: {self.iterations} in place of {self._seen}. "
                "To go on after an interruption use fit(checkpoint=...)."
            )

    def watched(self, callbacks: Any, step: PrivateStep) -> Any:
        """Adds to the callbacks what keeps count and renews the noise.

        Args:
            callbacks: A list of callbacks, or a `CallbackList`.
            step: What will be made.
        """
        given = getattr(callbacks, "callbacks", callbacks)
        kept = [_First(self), *given, _Last(self, step, self._seed)]
        if not isinstance(callbacks, keras.callbacks.CallbackList):
            return kept
        callbacks.callbacks = kept
        return callbacks


class _First(keras.callbacks.Callback):  # type: ignore[misc]
    """Comes before all other callbacks, and sees what they have not yet moved."""

    def __init__(self, course: Course) -> None:
        super().__init__()
        self._course = course

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._course.look()


class _Last(keras.callbacks.Callback):  # type: ignore[misc]
    """Comes after all other callbacks, and sees what they have restored."""

    def __init__(self, course: Course, step: PrivateStep, seed: int | None) -> None:
        super().__init__()
        self._course, self._step, self._seed = course, step, seed

    def on_train_begin(self, logs: Any = None) -> None:
        self._course.check_unmoved()
        self._course.note_restored()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._course.check_unmoved()
        if not self._course.correlated:
            # The noise of a step is a function of `iterations`, which a callback may set back.
            self._step.noise.renew(self._seed)
