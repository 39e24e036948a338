"""The places of an elastic run: which of them have a worker at the next start."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from tfdist.cluster.environment import whole_number
from tfdist.errors import LaunchError
from tfdist.launch.cause import Failure
from tfdist.launch.worker import Worker

_GPUS = "CUDA_VISIBLE_DEVICES"


class Slots:
    """The places for workers of one machine, some of which may be left out for a while.

    A place whose worker fails twice in a row is left out of the next start. At the start
    after that it is tried again, and left out again at its first failure.

    Args:
        plan: Gives the workers of a run with so many.
        least: So many must be left.
        most: So many there are.
    """

    def __init__(
        self, plan: Callable[[int], Sequence[Worker]], least: int = 1, most: int = 1
    ) -> None:
        self._plan, self._least = plan, least
        self._all = tuple(plan(most))
        self._failed: int | None = None
        self._doubtful: set[int] = set()
        self._left_out: int | None = None
        self.workers: Sequence[Worker] = self._all

    @property
    def _active(self) -> list[int]:
        return [slot for slot in range(len(self._all)) if slot != self._left_out]

    def loses(self, failure: Failure) -> bool:
        """Tells whether the next start will leave out the place of a worker that failed.

        Args:
            failure: The worker's.
        """
        if failure.told.preempted or failure.blames_peer:
            return False  # says nothing of this place
        slot = self._slot(failure)
        is_bad = slot == self._failed or slot in self._doubtful
        return is_bad and len(self._all) - 1 >= self._least

    def note(self, failure: Failure) -> None:
        """Chooses the places of the next start.

        Args:
            failure: Of the worker for which all are started again.
        """
        slot = self._slot(failure)
        if self.loses(failure):
            self._doubtful.add(slot)
            self._left_out, self._failed = slot, None
        else:
            self._left_out, self._failed = None, slot
        if self._left_out is None:
            self.workers = self._all
            return
        places = self._plan(len(self._active))
        # Each keeps the GPUs of its place: those of the one left out may be what is broken.
        self.workers = [
            dataclasses.replace(
                place,
                environment={
                    **{k: v for k, v in place.environment.items() if k != _GPUS},
                    **{k: v for k, v in self._all[s].environment.items() if k == _GPUS},
                },
            )
            for place, s in zip(places, self._active, strict=True)
        ]

    def _slot(self, failure: Failure) -> int:
        return self._active[list(self.workers).index(failure.worker)]


def parse_elastic(text: str) -> tuple[int, int]:
    """Reads `min:max`, the numbers of workers between which a run may go on.

    Args:
        text: Such as "2:4".

    Raises:
        LaunchError: It is something else.

    Example:
        >>> parse_elastic("2:4")
        (2, 4)
    """
    least, most = map(whole_number, text.partition(":")[::2])
    if least is not None and most is not None and 1 <= least <= most:
        return least, most
    raise LaunchError(
        "`--elastic` must be two numbers of workers, the smaller first, from 1 on. Received: "
        f"--elastic={text[:40]!r}. Write it like 2:4."
    )
