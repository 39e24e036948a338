"""How data continues from epoch to epoch, in the same way as in Keras's `EpochIterator`."""

from __future__ import annotations

from typing import NamedTuple


class DataPosition(NamedTuple):
    """The position of a training in its data.

    Attributes:
        number: The number of the pass over the data to which the next batch belongs.
        num_drawn: Number of batches drawn from that pass.
        iterators: Iterators that Keras would have made before that pass's iterator. A
            shuffled `tf.data.Dataset` has another order for each iterator.
        is_open: Whether that pass has its iterator, so that the next epoch goes on with it.
        batches: Batches of a pass; None until they are known, at the latest when one has ended.
    """

    number: int = 0
    num_drawn: int = 0
    iterators: int = 0
    is_open: bool = False
    batches: int | None = None

    def next_pass(self, iterators: int = 1) -> DataPosition:
        """Returns the beginning of the next pass.

        Args:
            iterators: Iterators that Keras makes for it, including the one it draws from.
        """
        return self._replace(
            number=self.number + 1,
            num_drawn=0,
            iterators=self.iterators + iterators,
            is_open=False,
        )


START = DataPosition()


class Epochs:
    """The epochs of one call of `fit` or `evaluate`, one after the other.

    Without `steps_per_epoch`, each epoch is a new pass over the data. With it, an epoch goes
    on where the last one stopped. It ends when its steps are made, or when the pass ends;
    then the next epoch begins a new pass.

    Args:
        steps: The user's number of batches an epoch, or None.
        batches: Batches of a pass, or None if unknown.
        position: The present position in the data.

    Attributes:
        position: The present position in the data.
    """

    def __init__(
        self, steps: int | None, batches: int | None, position: DataPosition = START
    ) -> None:
        self.position = position._replace(batches=position.batches or batches)
        self._steps = steps
        self._requested = 0

    @property
    def length(self) -> int | None:
        """Batches of an epoch, or None if the end of the data will show it."""
        return self._steps or self.position.batches

    @property
    def left(self) -> int | None:
        """The most batches left in the epoch, or None if the end of the data will show it."""
        if self.length is None:
            return None
        left = self.length - self._requested
        in_pass = self._left_in_pass
        return left if in_pass is None else min(left, in_pass)

    @property
    def _left_in_pass(self) -> int | None:
        batches = self.position.batches
        return None if batches is None else batches - self.position.num_drawn

    def begin(self) -> None:
        """Begins an epoch."""
        self._requested = 0
        if self.position.is_open and self._steps is None:
            self.position = self.position.next_pass()
        self.position = self.position._replace(is_open=True)

    def reset(self, batches: int | None) -> None:
        """Ends the present pass, and forgets the length of earlier passes.

        Args:
            batches: Batches of a pass, or None if unknown.
        """
        if self.position.is_open:
            self.position = self.position.next_pass()
        self.position = self.position._replace(batches=batches)

    def take(self, max_batches: int) -> int:
        """Draws batches.

        Args:
            max_batches: The number of batches, unless the pass ends before.

        Returns:
            The number of batches to draw; 0 at the epoch's end.
        """
        if self.length is not None and self._requested >= self.length:
            return 0
        in_pass = self._left_in_pass
        num_batches = max_batches if in_pass is None else min(max_batches, in_pass)
        # Keras counts whole executions, so an epoch may have more steps than requested.
        self._requested += max_batches
        self.position = self.position._replace(num_drawn=self.position.num_drawn + num_batches)
        return num_batches

    def end(self, ran_out: bool) -> None:
        """Ends an epoch.

        Args:
            ran_out: Whether the data ended where a batch was expected.
        """
        position = self.position
        if ran_out:
            # Keras counts the execution that failed too.
            batches = position.batches or position.num_drawn
            self.position = position.next_pass()._replace(batches=batches)
        elif self._left_in_pass == 0 and self._steps is not None:
            # Keras makes the next pass's iterator now.
            self.position = position.next_pass()._replace(is_open=True)
        elif self._left_in_pass == 0:
            self.position = position.next_pass(2)  # Keras also makes an iterator it never uses


def count_steps(steps: int | None, batches: int | None, epochs: int, at_once: int) -> int:
    """Counts the steps of a call of `fit` that begins with a new pass over the data.

    An epoch makes whole executions, unless the data ends. So it may have more steps than
    `steps_per_epoch`. If the number of batches is unknown, the data is taken as endless.

    Args:
        steps: The user's number of batches an epoch, or None.
        batches: Batches of a pass, or None if unknown.
        epochs: The number of epochs.
        at_once: The steps of one execution.

    Returns:
        The number of steps; 0 if both `steps` and `batches` are None.
    """
    data, total = Epochs(steps, batches), 0
    if data.length is None:
        return 0
    whole = -(-data.length // at_once) * at_once
    for _ in range(epochs):
        data.begin()
        total += data.take(whole)
        data.end(ran_out=False)
    return total
