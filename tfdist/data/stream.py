"""The loop's side of the data: what Keras iterates over."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import tensorflow as tf

from tfdist import note
from tfdist.data.source import Source
from tfdist.errors import ArgumentError
from tfdist.strategies.base import Strategy


class Stream:
    """What Keras's loop iterates over: one iteration is an epoch.

    Args:
        source: The data.
        strategy: Deals shares out to replicas.
        first_epoch: Called when the first share is drawn: epochs drawn in earlier runs.
        skip: Steps of the first epoch that were made already.
        on_progress: Called after each step with the steps made of the epoch.
        by_number: Whether the strategy may be given row numbers in place of rows.
        is_watched: Whether somebody looks at the model between two steps.
        logs: Of the last step that was made already.
        trains: Whether its steps change the weights, which a launcher is told of.
    """

    def __init__(
        self,
        source: Source,
        strategy: Strategy,
        first_epoch: Callable[[], int] = lambda: 0,
        skip: int = 0,
        on_progress: Callable[[int], None] = lambda step: None,
        by_number: bool = True,
        is_watched: bool = True,
        logs: Mapping[str, Any] | None = None,
        trains: bool = False,
    ) -> None:
        self.source = source
        self.strategy = strategy
        self.first_epoch = first_epoch
        self.drawn = skip > 0
        self.logs = dict(logs or {})
        self.steps_taken = 0
        self.steps_of_epoch = 0
        self.on_progress = on_progress
        self.is_watched = is_watched
        self.columns = source.columns if by_number and strategy.gathers_rows else None
        self._trains = trains
        self._skip = skip
        self._epoch: int | None = None
        self._repeated: Any = None
        self._running: Any = None

    def __iter__(self) -> Epoch:
        skip = self._skip if self._epoch is None else 0
        return Epoch(self, self.source.steps, skip)

    def start_epoch(self) -> Any:
        """Gives an iterator over shares that stands at the beginning of the next epoch."""
        skip = self._skip if self._epoch is None else 0
        self.steps_of_epoch = skip
        self._epoch = self.first_epoch() if self._epoch is None else self._epoch + 1
        if self._running is None or not self.source.continues:
            epoch = self._epoch
            place = self.strategy.place

            def build() -> Any:
                if self.columns is not None:
                    return self.source.row_numbers(epoch, skip)
                return self.source.shares(place, epoch, skip)

            shares = self._repeated
            if shares is None:
                shares = self.strategy.distribute(build)
                if self.source.repeats and self.columns is None and not skip:
                    self._repeated = shares
            self._running = iter(shares)
        return self._running

    def note_progress(self, steps: int) -> None:
        """Tells that steps of the epoch were made.

        Args:
            steps: How many.
        """
        self.steps_of_epoch += steps
        if self._trains:
            note.here.tell(self._epoch or 0, self.steps_of_epoch, steps)
        self.on_progress(self.steps_of_epoch)


class Epoch:
    """One epoch's shares; begins when the first is drawn, since Keras makes more than it uses.

    Args:
        stream: Where they come from.
        steps: How many there are, or None when only the data knows.
        made: How many of them were made already.
    """

    def __init__(self, stream: Stream, steps: int | None, made: int = 0) -> None:
        self._stream = stream
        self._left = steps
        self._made = made
        self._iterator: Any = None

    @property
    def iterator(self) -> Any:
        """The iterator that traced functions draw from."""
        if self._iterator is None:
            self._iterator = self._stream.start_epoch()
        return self._iterator

    @property
    def begins(self) -> bool:
        """Whether no share was drawn of it yet, and buffers have to fill."""
        return self._iterator is None

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """Wraps the drawing of steps, to tell data that never began from data that ended."""
        try:
            yield
        except tf.errors.OutOfRangeError:
            if not self._stream.drawn:
                raise ArgumentError(
                    "A data set must have at least one batch. Received: one that ends at "
                    "once. Check the filter or the path that produced it."
                ) from None
            raise
        self._stream.drawn = True

    @property
    def columns(self) -> Any:
        """What shares are row numbers of, or None where they are rows."""
        return self._stream.columns

    @property
    def can_end_early(self) -> bool:
        """Whether drawing may fail before the epoch's steps are over, as arrays' cannot."""
        return self._stream.source.columns is None

    @property
    def may_be_empty(self) -> bool:
        """Whether a share may hold a row that does not count."""
        return self._stream.source.may_be_empty

    @property
    def is_watched(self) -> bool:
        """Whether somebody looks at the model between two steps."""
        return self._stream.is_watched

    @property
    def steps_left(self) -> int | None:
        """Steps of the epoch not taken yet, or None when only the data knows."""
        return self._left

    @property
    def steps_taken(self) -> int:
        """Steps since the stream began, the one under way included."""
        return self._stream.steps_taken

    def note_progress(self, steps: int) -> None:
        """Tells that steps were made.

        Args:
            steps: How many.
        """
        self._stream.note_progress(steps)

    def take(self, wanted: int) -> int:
        """Says how many steps may be drawn now.

        Args:
            wanted: At most so many.

        Raises:
            StopIteration: The epoch is over.
        """
        taken = wanted if self._left is None else min(wanted, self._left)
        if taken == 0:
            raise StopIteration
        if self._left is not None:
            self._left -= taken
        self._stream.steps_taken += taken
        return taken

    def pass_made(self, taken: int) -> int:
        """Leaves out steps that were made already.

        Args:
            taken: How many steps were taken just now.

        Returns:
            How many of these are to be made.
        """
        if not self._made:
            return taken
        _ = self.iterator  # begins the epoch, also when no step of it is left
        passed = min(taken, self._made)
        self._made -= passed
        return taken - passed

    @property
    def logs(self) -> dict[str, Any]:
        """Of the last step that was made already."""
        return self._stream.logs

    def __iter__(self) -> Epoch:
        return self

    def __next__(self) -> Any:
        self.take(1)
        return self._stream.strategy.next_share(self.iterator)
