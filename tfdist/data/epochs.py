"""How data goes on from epoch to epoch: as Keras's `EpochIterator` has it."""

from __future__ import annotations

from typing import NamedTuple


class DataPosition(NamedTuple):
    """Where in its data a training stands.

    Attributes:
        number: Of the pass over the data that the next batch comes from.
        drawn: Batches that were drawn of that pass.
        iterators: Iterators that Keras would have made of the data before that pass's. A
            shuffled `tf.data.Dataset` gives each another order.
        is_open: Whether that pass has its iterator, so that the next epoch goes on with it.
        batches: Of a pass, as far as one that ended has shown.
    """

    number: int = 0
    drawn: int = 0
    iterators: int = 0
    is_open: bool = False
    batches: int | None = None

    def next_pass(self, iterators: int = 1) -> DataPosition:
        """Gives the beginning of the pass after this one.

        Args:
            iterators: That Keras makes for it, the one it draws from included.
        """
        return self._replace(
            number=self.number + 1,
            drawn=0,
            iterators=self.iterators + iterators,
            is_open=False,
        )


START = DataPosition()


class Epochs:
    """The epochs of one call of `fit` or `evaluate`, one after the other.

    Without `steps_per_epoch` each epoch is a new pass over the data. With it an epoch goes on
    where the last one stopped; it is over when its steps are made, or when the pass is, and
    then the next epoch begins another.

    Args:
        steps: Batches an epoch, if the user has said.
        batches: Of a pass, if known.
        position: Where the data stands.

    Attributes:
        position: Where the data stands.
    """

    def __init__(
        self, steps: int | None, batches: int | None, position: DataPosition = START
    ) -> None:
        self.position = position._replace(batches=position.batches or batches)
        self._steps = steps
        self._asked = 0

    @property
    def length(self) -> int | None:
        """Batches that an epoch is to have, or None when only the data knows."""
        return self._steps or self.position.batches

    @property
    def left(self) -> int | None:
        """Batches of the epoch that are left at most, or None when only the data knows."""
        if self.length is None:
            return None
        left = self.length - self._asked
        in_pass = self._left_in_pass
        return left if in_pass is None else min(left, in_pass)

    @property
    def _left_in_pass(self) -> int | None:
        batches = self.position.batches
        return None if batches is None else batches - self.position.drawn

    def begin(self) -> None:
        """Begins an epoch."""
        self._asked = 0
        if self.position.is_open and self._steps is None:
            self.position = self.position.next_pass()
        self.position = self.position._replace(is_open=True)

    def reset(self, batches: int | None) -> None:
        """Forgets the pass that goes on, and what passes have shown.

        Args:
            batches: Of a pass, if known.
        """
        if self.position.is_open:
            self.position = self.position.next_pass()
        self.position = self.position._replace(batches=batches)

    def take(self, wanted: int) -> int:
        """Draws batches.

        Args:
            wanted: So many, unless the pass ends before.

        Returns:
            How many there are; 0 at the epoch's end.
        """
        if self.length is not None and self._asked >= self.length:
            return 0
        in_pass = self._left_in_pass
        taken = wanted if in_pass is None else min(wanted, in_pass)
        # Keras counts whole executions, so that an epoch may have more steps than asked for.
        self._asked += wanted
        self.position = self.position._replace(drawn=self.position.drawn + taken)
        return taken

    def end(self, ran_out: bool) -> None:
        """Ends an epoch.

        Args:
            ran_out: Whether the data ended where a batch was expected.
        """
        position = self.position
        if ran_out:
            # Keras counts the execution that failed as if it had been made.
            known = position.batches or position.drawn
            self.position = position.next_pass()._replace(batches=known)
        elif self._left_in_pass == 0 and self._steps is not None:
            # Keras makes the next pass's iterator now.
            self.position = position.next_pass()._replace(is_open=True)
        elif self._left_in_pass == 0:
            self.position = position.next_pass(2)  # Keras makes one now that it never uses
