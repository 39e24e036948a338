"""The user's settings for checkpoints."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfdist.errors import ArgumentError

if TYPE_CHECKING:
    from tfdist.strategies.base import Strategy


@dataclass(frozen=True)
class Checkpoint:
    """Where and how often `fit` saves the complete state of a training.

    Pass it to `fit` as `checkpoint`. A directory alone stands for `Checkpoint(directory)`.
    If `fit` finds a checkpoint there, it continues from it, even in the middle of an epoch.
    The final weights are those of a training that was never stopped.

    Args:
        directory: A directory for this training only; created if it does not exist. Only the
            chief reads and writes it, so the other workers need no access.
        every: "epoch", to save at the end of each epoch; a whole number of steps; or a
            `datetime.timedelta`. The end of training is always saved.
        keep: Number of latest checkpoints to keep, at least 1. With 2 or more, `fit` can
            continue from an older one if the last is damaged.

    Raises:
        ArgumentError: An argument is invalid.

    Example:
        >>> import keras, numpy as np, tempfile, tfdist
        >>> directory = tempfile.mkdtemp()
        >>> def train(epochs):
        ...     model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        ...     model.compile(optimizer="adam", loss="mse")
        ...     x, y = np.ones((10, 4), "float32"), np.ones((10, 1), "float32")
        ...     checkpoint = tfdist.Checkpoint(directory, every=2)
        ...     return tfdist.fit(
        ...         model, x, y, batch_size=4, epochs=epochs, checkpoint=checkpoint, verbose=0
        ...     )
        >>> train(epochs=2).epoch
        [0, 1]
        >>> train(epochs=3).epoch  # makes the third epoch only
        [0, 1, 2]
    """

    directory: str | os.PathLike[str]
    every: str | int | datetime.timedelta = "epoch"
    keep: int = 3

    def __post_init__(self) -> None:
        if not isinstance(self.directory, str | os.PathLike) or not os.fspath(self.directory):
            raise ArgumentError(
                "`directory` of `Checkpoint` must be a path. Received: "
                f"directory={self.directory!r}."
            )
        every = self.every
        is_steps = isinstance(every, int) and not isinstance(every, bool) and every >= 1
        is_time = isinstance(every, datetime.timedelta) and every > datetime.timedelta(0)
        if not (every == "epoch" or is_steps or is_time):
            raise ArgumentError(
                "`every` of `Checkpoint` must be 'epoch', a number of steps of at least 1, or "
                f"a datetime.timedelta above 0. Received: every={every!r}."
            )
        if not isinstance(self.keep, int) or isinstance(self.keep, bool) or self.keep < 1:
            raise ArgumentError(
                "`keep` of `Checkpoint` must be a whole number of at least 1. Received: "
                f"keep={self.keep!r}."
            )

    @classmethod
    def of(cls, checkpoint: Any) -> Checkpoint:
        """Reads the argument `checkpoint` of `fit`.

        Args:
            checkpoint: A `Checkpoint` or a directory.

        Raises:
            ArgumentError: It is neither.
        """
        if isinstance(checkpoint, cls):
            return checkpoint
        if isinstance(checkpoint, str | os.PathLike):
            return cls(checkpoint)
        raise ArgumentError(
            "`checkpoint` must be a tfdist.Checkpoint or a directory. Received: "
            f"checkpoint={checkpoint!r}."
        )

    @property
    def path(self) -> Path:
        """The directory."""
        return Path(os.fspath(self.directory)).expanduser()

    def check_strategy(self, strategy: Strategy) -> None:
        """Refuses strategies that are not saved like this.

        Args:
            strategy: Where the replicas are.

        Raises:
            ArgumentError: It is one of them.
        """
        if strategy.elastic:
            raise ArgumentError(
                "`checkpoint` must not be passed in an elastic run, which keeps its state in "
                f"memory. Received: checkpoint={self!r}. Use "
                "keras.callbacks.BackupAndRestore against the loss of all processes at once."
            )
        if not strategy.synchronous and self.every != "epoch":
            raise ArgumentError(
                "`every` of `Checkpoint` must be 'epoch' in asynchronous training, which has "
                f"no step of all workers. Received: every={self.every!r}."
            )
