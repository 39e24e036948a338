"""What a training may have besides: privacy, checkpoints, processes that come and go."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from tfdist import data
from tfdist.step.exchange import ExchangeMaker
from tfdist.step.own_step import StepMaker
from tfdist.step.prepared import Prepared
from tfdist.training.request import Request

Begins = tuple[int, int, Callable[[], data.DataPosition], dict[str, Any]]


class Extension:
    """Takes part in one `fit`; each method does nothing here.

    `fit` calls them in this order: `choose`, `bind`, then for each attempt to train `facts`,
    `notice` and `callbacks`, within `running`, and `report` at the end.

    Attributes:
        name: Its key in a checkpoint.
        needs_state: Whether all of the model's variables must be there before it trains.
        exchange_maker: Of what is put around the reduction of gradients, or None.
        step_maker: Of the step that takes the place of Keras's, or None.
    """

    name: ClassVar[str] = ""
    needs_state: bool = False
    exchange_maker: ExchangeMaker | None = None
    step_maker: StepMaker | None = None

    def choose(self, request: Request) -> Request:
        """Refuses what cannot be, and asks for something else where it must.

        Args:
            request: What is asked for until now.

        Raises:
            ArgumentError: The request is one that it cannot take part in.
        """
        return request

    def bind(self, request: Request, source: data.Source) -> None:
        """Looks at the data, and at the model, which is built.

        Args:
            request: What is asked for.
            source: The data.
        """

    def facts(self) -> dict[str, Any]:
        """Gives what all workers must have been asked alike, by name."""
        return {}

    def notice(self, request: Request) -> str | None:
        """Says what the user should know before training, or None.

        Args:
            request: What is asked for.
        """
        return None

    def callbacks(self, request: Request, given: Any, prepared: Prepared) -> Any:
        """Adds to the callbacks.

        Args:
            request: What is asked for.
            given: A list of callbacks, or a `CallbackList`.
            prepared: The model.
        """
        return given

    def running(self) -> contextlib.AbstractContextManager[None]:
        """Makes a context around the training."""
        return contextlib.nullcontext()

    def report(self, request: Request, history: Any) -> None:
        """Adds to what `fit` returns.

        Args:
            request: What was asked for.
            history: Keras's `History`.
        """

    # --- where a training goes on in another process --------------------------------------

    def settings(self) -> Any:
        """Gives what must stay as it is in a training that goes on, plain data or None."""
        return None

    def go_on(self, saved: Any, steps: int = 0, directory: Path | None = None) -> Any:
        """Takes its state from a checkpoint.

        Args:
            saved: What an earlier process got from this method; None if this is the first.
            steps: That the checkpoint has.
            directory: Where checkpoints are; None if there are none.

        Returns:
            What is to be saved, plain data or None.
        """
        return None

    def note_restored(self) -> None:
        """Learns that the model's state was put back."""


class Continuation(Extension):
    """Where a training begins, and what hears of its steps: here it begins at its start.

    Args:
        others: The training's other extensions, whose state goes on with it.
    """

    def __init__(self, others: Sequence[Extension] = ()) -> None:
        self._others = others

    def choose(self, request: Request) -> Request:
        """Lets the others begin."""
        for other in self._others:
            other.go_on(None)
        return request

    def train(self, attempt: Callable[[], Any]) -> Any:
        """Trains to the end.

        Args:
            attempt: Trains from where `begin` says, and returns Keras's `History`.
        """
        return attempt()

    def begin_attempt(self, source: data.Source) -> None:
        """Makes the data ready for an attempt.

        Args:
            source: The data.
        """

    def begin(self, epoch: int, start: Callable[[], data.DataPosition]) -> Begins:
        """Says where an attempt begins.

        Args:
            epoch: Where `fit` was asked to.
            start: Says where its data begins, once callbacks have begun.

        Returns:
            The epoch, the steps made of it, what says where its data began, and the logs of
            the last step made.
        """
        return epoch, 0, start, {}

    def note_step(self, step: int) -> None:
        """Hears of a step.

        Args:
            step: Steps made of the epoch.
        """

    def loop_callbacks(
        self,
        given: Any,
        prepared: Prepared,
        *,
        where: Callable[[], data.DataPosition],
        **options: Any,
    ) -> Any:
        """Makes what Keras's loop takes as callbacks.

        Args:
            given: This process's callbacks.
            prepared: The model.
            where: Says where the data stands, between two epochs.
            **options: Of `keras.callbacks.CallbackList`.
        """
        return given
