"""The loop's side of the data: what Keras iterates over."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import tensorflow as tf

from tfdist.cluster import heartbeat
from tfdist.data.epochs import DataPosition, Epochs
from tfdist.data.source import Source
from tfdist.errors import ArgumentError
from tfdist.strategies.base import Strategy


class Stream:
    """What Keras's loop iterates over: one iteration is an epoch.

    Args:
        source: The data.
        strategy: Deals shares out to replicas.
        start: Says where the data stands; called when the first share is drawn, since a
            callback may restore a model.
        epoch: The number of the first epoch.
        made: Steps of the first epoch that were made already.
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
        start: Callable[[], DataPosition] = DataPosition,
        *,
        epoch: int = 0,
        made: int = 0,
        on_progress: Callable[[int], None] = lambda step: None,
        by_number: bool = True,
        is_watched: bool = True,
        logs: Mapping[str, Any] | None = None,
        trains: bool = False,
    ) -> None:
        self.source = source
        self.strategy = strategy
        self.has_drawn = made > 0
        self.logs = dict(logs or {})
        self.steps_taken = 0
        self.steps_of_epoch = 0
        self.on_progress = on_progress
        self.is_watched = is_watched
        self.columns = source.columns if by_number and strategy.gathers_rows else None
        self.iterator: Any = None
        self._start = start
        self._trains = trains
        self._epoch = epoch
        self._made = made
        self._epochs: Epochs | None = None
        self._current: Epoch | None = None
        self._pass: int | None = None
        self._pipeline: Any = None
        self._has_run_out = False

    @property
    def epochs(self) -> Epochs:
        """How the data goes on."""
        if self._epochs is None:
            source = self.source
            self._epochs = Epochs(source.asked_steps, source.batches, self._start())
        return self._epochs

    def __iter__(self) -> Epoch:
        return Epoch(self)

    def begin_epoch(self, epoch: Epoch) -> int:
        """Begins an epoch, when its first share is to be drawn.

        Args:
            epoch: What draws.

        Returns:
            The steps that were made of it already.
        """
        made, self._made = self._made, 0
        self.steps_of_epoch = made
        self._current = epoch
        self.epochs.begin()
        position = self.epochs.position
        goes_on = self._pass == position.number or self.source.flows
        if self.iterator is None or not goes_on:
            self.iterator = self._iterator(position._replace(drawn=position.drawn + made))
        self._pass = position.number
        return made

    def _iterator(self, position: DataPosition) -> Any:
        place, source = self.strategy.place, self.source

        def build() -> Any:
            if self.columns is not None:
                return source.row_numbers(position)
            return source.shares(place, position)

        shares = self._pipeline
        if shares is None:
            shares = self.strategy.distribute(build)
            if source.repeats and self.columns is None and not position.drawn:
                self._pipeline = shares
        source.note_iterator(position)
        return iter(shares)

    @property
    def position(self) -> DataPosition:
        """Where the data stands, between two epochs."""
        return self.epochs.position

    @property
    def is_over(self) -> bool:
        """Whether no epoch can have a batch any more."""
        return self._has_run_out and not self.source.repeatable

    def close(self) -> None:
        """Ends the last epoch's stream."""
        self.iterator = self._pipeline = None
        self.source.finish(self.position)

    def on_epoch_end(self) -> None:
        """Ends the epoch that has begun; Keras also calls it before the first one.

        It does so before each validation, which then begins another pass.
        """
        epoch, self._current = self._current, None
        if epoch is not None:
            self.epochs.end(epoch.ran_out)
            self._has_run_out = epoch.ran_out
            self._epoch += 1
        elif self._epochs is not None:
            self._epochs.reset(self.source.batches)
        self.source.on_epoch_end()

    def note_progress(self, steps: int) -> None:
        """Tells that steps of the epoch were made.

        Args:
            steps: How many.
        """
        self.steps_of_epoch += steps
        if self._trains:
            heartbeat.here.record_steps(self._epoch, self.steps_of_epoch, steps)
        self.on_progress(self.steps_of_epoch)


class Epoch:
    """One epoch's shares; begins when the first is drawn, since Keras makes more than it uses.

    Args:
        stream: Where they come from.

    Attributes:
        ran_out: Whether the data ended where a share was expected.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._made = 0
        self._has_begun = False
        self.ran_out = False

    @property
    def iterator(self) -> Any:
        """The iterator that traced functions draw from."""
        return self._stream.iterator

    @property
    def begins(self) -> bool:
        """Whether no share was drawn of it yet, and buffers have to fill."""
        return not self._has_begun

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """Wraps the drawing of an execution's steps, of which one at least must be there.

        Raises:
            ArgumentError: The data has ended before it began.
            tf.errors.OutOfRangeError: It has ended.
        """
        try:
            yield
        except tf.errors.OutOfRangeError:
            self.ran_out = True
            if not self._stream.has_drawn:
                raise ArgumentError(
                    "A data set must have at least one batch. Received: one that ends at "
                    "once. Check the filter or the path that produced it."
                ) from None
            raise
        self._stream.has_drawn = True

    @property
    def columns(self) -> Any:
        """What shares are row numbers of, or None where they are rows."""
        return self._stream.columns

    @property
    def may_end_early(self) -> bool:
        """Whether drawing may fail before the epoch's steps are over."""
        return self._stream.source.batches is None

    @property
    def suspects(self) -> list[str]:
        """What could make the data differ between workers."""
        return self._stream.source.suspects()

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
        return self._stream.epochs.left

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
        if not self._has_begun:
            self._made = self._stream.begin_epoch(self)
            self._has_begun = True
        taken = 0 if self.ran_out else self._stream.epochs.take(wanted)
        if taken == 0:
            raise StopIteration
        self._stream.steps_taken += taken
        return taken

    def pass_made(self, taken: int) -> int:
        """Leaves out steps that were made already.

        Args:
            taken: How many steps were taken just now.

        Returns:
            How many of these are to be made.
        """
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
