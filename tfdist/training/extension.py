"""The interface of extensions: privacy, checkpoints, elastic runs and others."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from tfdist import data
from tfdist.step.exchange import ExchangeMaker
from tfdist.step.own_round import RoundMaker
from tfdist.step.own_step import StepMaker
from tfdist.step.prepared import PreparedModel
from tfdist.training.request import Request

Begins = tuple[int, int, Callable[[], data.DataPosition], dict[str, Any]]


class Extension:
    """Takes part in one `fit`. By default, each method does nothing.

    `fit` calls the methods in this order: `choose`, `around`, `source`, `bind`, then for each
    attempt to train `facts`, `notice` and `callbacks`, inside the context `running`, and
    `report` at the end.

    Attributes:
        name: The extension's key in a checkpoint.
        needs_state: Whether the model must have all its variables before training begins.
        keeps_secrets: Whether its state holds a secret, so that other users of the machine may
            not read a checkpoint.
        exchange_maker: Makes what wraps the reduction of gradients, or None.
        step_maker: Makes the step that replaces Keras's, or None.
        round_maker: Makes rounds of local steps that replace Keras's step, or None.
    """

    name: ClassVar[str] = ""
    needs_state: bool = False
    keeps_secrets: ClassVar[bool] = False
    exchange_maker: ExchangeMaker | None = None
    step_maker: StepMaker | None = None
    round_maker: RoundMaker | None = None

    def choose(self, request: Request) -> Request:
        """Checks the request, and replaces arguments if it must.

        Args:
            request: The arguments of `fit`, as earlier extensions have left them.

        Returns:
            The request, with replacements.

        Raises:
            ArgumentError: The extension does not support the request.
        """
        return request

    def source(self, request: Request, source: data.Source) -> data.Source:
        """Returns the source of training data, or another one that draws from it otherwise.

        Args:
            request: The arguments of `fit`.
            source: The training data.
        """
        return source

    def around(self, request: Request) -> contextlib.AbstractContextManager[None]:
        """Makes a context around all that follows `choose`.

        Args:
            request: The arguments of `fit`, as all extensions have left them.
        """
        return contextlib.nullcontext()

    def bind(self, request: Request, source: data.Source) -> None:
        """Inspects the data and the model. The model has its variables now.

        Args:
            request: The arguments of `fit`.
            source: The training data.
        """

    def facts(self) -> dict[str, Any]:
        """Returns values, by name, that must be equal on all workers."""
        return {}

    def notice(self, request: Request) -> str | None:
        """Returns a line for the user before training, or None.

        Args:
            request: The arguments of `fit`.
        """
        return None

    def callbacks(self, request: Request, callbacks: Any, prepared: PreparedModel) -> Any:
        """Adds callbacks.

        Args:
            request: The arguments of `fit`.
            callbacks: A list of callbacks, or a `CallbackList`.
            prepared: The model's compiled functions and state.

        Returns:
            The callbacks, of the same kind.
        """
        return callbacks

    def running(self) -> contextlib.AbstractContextManager[None]:
        """Makes a context around the training."""
        return contextlib.nullcontext()

    def report(self, request: Request, history: Any) -> None:
        """Adds to the `History` that `fit` returns.

        Args:
            request: The arguments of `fit`.
            history: Keras's `History`.
        """

    # --- a training that another process continues ----------------------------------------

    def settings(self) -> Any:
        """Returns settings that must not change in a continued training, plain data or None."""
        return None

    def go_on(self, saved: Any, steps: int = 0, directory: Path | None = None) -> Any:
        """Restores its state from a checkpoint.

        Args:
            saved: The value that this method returned in an earlier process, or None in the
                first one.
            steps: Number of steps that the checkpoint contains.
            directory: The directory of the checkpoints, or None.

        Returns:
            The value to save in the next checkpoints, plain data or None.
        """
        return None

    def note_restored(self) -> None:
        """Called when the model's state has been restored."""


class Continuation(Extension):
    """Decides where a training begins, and follows its steps. By default it begins anew.

    Args:
        others: The training's other extensions, whose state it restores.
    """

    def __init__(self, others: Sequence[Extension] = ()) -> None:
        self._others = others

    def choose(self, request: Request) -> Request:
        """Tells the other extensions to begin without a saved state."""
        for other in self._others:
            other.go_on(None)
        return request

    def train(self, attempt: Callable[[], Any]) -> Any:
        """Trains to the end.

        Args:
            attempt: Trains from where `begin` says. Returns Keras's `History`.
        """
        return attempt()

    def close(self) -> None:
        """Called at the end of `fit`, also if it ends by an error before training begins."""

    def begin_attempt(self, source: data.Source) -> None:
        """Prepares the data for an attempt.

        Args:
            source: The training data.
        """

    def begin(self, epoch: int, start: Callable[[], data.DataPosition]) -> Begins:
        """Returns where an attempt begins.

        Args:
            epoch: The `initial_epoch` of `fit`.
            start: Returns the position at which its data begins. To call after the
                callbacks' `on_train_begin`.

        Returns:
            The epoch, the number of its steps that are completed, a function like `start`,
            and the logs of the last completed step.
        """
        return epoch, 0, start, {}

    def note_step(self, step: int) -> None:
        """Called after each step.

        Args:
            step: Number of completed steps of the epoch.
        """

    def loop_callbacks(
        self,
        callbacks: Any,
        prepared: PreparedModel,
        *,
        where: Callable[[], data.DataPosition],
        **options: Any,
    ) -> Any:
        """Makes the callbacks for Keras's loop.

        Args:
            callbacks: This process's callbacks.
            prepared: The model's compiled functions and state.
            where: Returns the position of the data, between two epochs.
            **options: Arguments of `keras.callbacks.CallbackList`.
        """
        return callbacks
