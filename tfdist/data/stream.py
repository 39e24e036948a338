"""The stream of batches over which Keras's loop iterates."""

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
    """The data of a call: one iteration of Keras's loop over it is an epoch.

    Args:
        source: The data.
        strategy: Distributes shares to replicas.
        start: Returns the position in the data. It is called when the first share is drawn,
            because a callback may restore a model before.
        epoch: The number of the first epoch.
        steps_made: Steps of the first epoch that an earlier process made.
        on_progress: Called after each step with the number of steps in the epoch.
        by_number: Whether the strategy may get row numbers in place of rows.
        is_watched: Whether callbacks read the model between two steps.
        logs: The logs of the last step that an earlier process made.
        trains: Whether the steps are training steps, which the launcher is told about.
    """

    def __init__(
        self,
        source: Source,
        strategy: Strategy,
        start: Callable[[], DataPosition] = DataPosition,
        *,
        epoch: int = 0,
        steps_made: int = 0,
        on_progress: Callable[[int], None] = lambda step: None,
        by_number: bool = True,
        is_watched: bool = True,
        logs: Mapping[str, Any] | None = None,
        trains: bool = False,
    ) -> None:
        self.source = source
        self.strategy = strategy
        self.has_drawn = steps_made > 0
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
        self._steps_to_skip = steps_made
        self._epochs: Epochs | None = None
        self._current: Epoch | None = None
        self._pass: int | None = None
        self._pipeline: Any = None
        self._has_run_out = False

    @property
    def epochs(self) -> Epochs:
        """The epochs of this call."""
        if self._epochs is None:
            source = self.source
            self._epochs = Epochs(source.requested_steps, source.batches, self._start())
        return self._epochs

    def __iter__(self) -> Epoch:
        return Epoch(self)

    def begin_epoch(self, epoch: Epoch) -> int:
        """Begins an epoch, when its first share is to be drawn.

        Args:
            epoch: The epoch.

        Returns:
            The steps of the epoch that an earlier process made.
        """
        steps_made, self._steps_to_skip = self._steps_to_skip, 0
        self.steps_of_epoch = steps_made
        self._current = epoch
        self.epochs.begin()
        position = self.epochs.position
        # As in Keras, an epoch may end within a pass, and the next one goes on with the same
        # iterator. A new iterator would shuffle the pass again.
        goes_on = self._pass == position.number or self.source.spans_passes
        if self.iterator is None or not goes_on:
            self.iterator = self._iterator(
                position._replace(num_drawn=position.num_drawn + steps_made)
            )
        self._pass = position.number
        return steps_made

    def _iterator(self, position: DataPosition) -> Any:
        place, source = self.strategy.place, self.source

        def build() -> Any:
            if self.columns is not None:
                return source.row_numbers(position)
            return source.shares(place, position)

        shares = self._pipeline
        if shares is None:
            shares = self.strategy.distribute(build)
            if source.is_same_each_pass and self.columns is None and not position.num_drawn:
                self._pipeline = shares
        source.note_iterator(position)
        return iter(shares)

    @property
    def position(self) -> DataPosition:
        """The position in the data, between two epochs."""
        return self.epochs.position

    @property
    def is_over(self) -> bool:
        """Whether the data has ended for good: no further epoch can have a batch."""
        return self._has_run_out and not self.source.repeatable

    def close(self) -> None:
        """Ends the last epoch's stream."""
        self.iterator = self._pipeline = None
        self.source.finish(self.position)

    def on_epoch_end(self) -> None:
        """Ends the present epoch, if there is one.

        Keras also calls it before the first epoch and before each validation: a validation
        then begins a new pass.
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
        """Records steps of the epoch.

        Args:
            steps: How many.
        """
        self.steps_of_epoch += steps
        if self._trains:
            heartbeat.here.record_steps(self._epoch, self.steps_of_epoch, steps)
        self.on_progress(self.steps_of_epoch)


class Epoch:
    """The shares of one epoch.

    The epoch begins when its first share is drawn: Keras makes iterators that it never uses.

    Args:
        stream: The stream of this call.

    Attributes:
        ran_out: Whether the data ended where a share was expected.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._steps_to_skip = 0
        self._has_begun = False
        self.ran_out = False

    @property
    def iterator(self) -> Any:
        """The iterator from which traced functions draw."""
        return self._stream.iterator

    @property
    def begins(self) -> bool:
        """Whether no share was drawn yet, so that buffers have to fill."""
        return not self._has_begun

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """Wraps the drawing of an execution's steps.

        Raises:
            ArgumentError: The data has no batch at all.
            tf.errors.OutOfRangeError: The data has ended.
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
        """The tensors whose row numbers are drawn, or None if rows are drawn."""
        return self._stream.columns

    @property
    def may_end_early(self) -> bool:
        """Whether the data may end before the epoch's steps are made."""
        return self._stream.source.batches is None

    @property
    def suspects(self) -> list[str]:
        """Causes that could make the data differ between workers."""
        return self._stream.source.suspects()

    @property
    def may_be_empty(self) -> bool:
        """Whether a share may consist of a padding row."""
        return self._stream.source.may_be_empty

    @property
    def is_watched(self) -> bool:
        """Whether callbacks read the model between two steps."""
        return self._stream.is_watched

    @property
    def steps_left(self) -> int | None:
        """Steps left in the epoch, or None if only the end of the data will show it."""
        return self._stream.epochs.left

    @property
    def steps_taken(self) -> int:
        """Steps since the stream began, including the present one."""
        return self._stream.steps_taken

    def note_progress(self, steps: int) -> None:
        """Records steps of the epoch.

        Args:
            steps: How many.
        """
        self._stream.note_progress(steps)

    def take(self, max_steps: int) -> int:
        """Returns how many steps may be drawn now.

        Args:
            max_steps: The most steps.

        Raises:
            StopIteration: The epoch is over.
        """
        if not self._has_begun:
            self._steps_to_skip = self._stream.begin_epoch(self)
            self._has_begun = True
        num_steps = 0 if self.ran_out else self._stream.epochs.take(max_steps)
        if num_steps == 0:
            raise StopIteration
        self._stream.steps_taken += num_steps
        return num_steps

    def pass_made(self, num_steps: int) -> int:
        """Leaves out steps that an earlier process made.

        Args:
            num_steps: How many steps were taken just now.

        Returns:
            How many of these steps are to be made.
        """
        skipped = min(num_steps, self._steps_to_skip)
        self._steps_to_skip -= skipped
        return num_steps - skipped

    @property
    def logs(self) -> dict[str, Any]:
        """The logs of the last step that an earlier process made."""
        return self._stream.logs

    def __iter__(self) -> Epoch:
        return self

    def __next__(self) -> Any:
        self.take(1)
        return self._stream.strategy.next_share(self.iterator)
