"""The slots of an elastic run: which of them get a worker at the next start."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from tfdist.cluster.environment import whole_number
from tfdist.errors import HUNG, LaunchError
from tfdist.launch.cause import Failure
from tfdist.launch.worker import Worker

_GPUS = "CUDA_VISIBLE_DEVICES"


class ElasticSlots:
    """The slots for workers of one machine; a slot may be left out for a while.

    A slot whose worker fails twice in a row is left out of the next start. At the start after
    that it is used again, and left out again after its first failure.

    Args:
        plan: Returns the workers of a run with a given number of workers.
        least: The least number of workers.
        most: The number of slots.
    """

    def __init__(
        self, plan: Callable[[int], Sequence[Worker]], least: int = 1, most: int = 1
    ) -> None:
        self._plan, self._least = plan, least
        self._all = tuple(plan(most))
        self._failed_slot: int | None = None
        self._suspect_slots: set[int] = set()
        self._omitted_slot: int | None = None
        self.workers: Sequence[Worker] = self._all

    @property
    def _active(self) -> list[int]:
        return [slot for slot in range(len(self._all)) if slot != self._omitted_slot]

    def leaves_out(self, failure: Failure) -> bool:
        """Returns whether the next start will leave out the slot of a failed worker.

        Args:
            failure: The worker's failure.
        """
        slot = self._slot_at_fault(failure)
        is_bad = slot is not None and (slot == self._failed_slot or slot in self._suspect_slots)
        return is_bad and len(self._all) - 1 >= self._least

    def plan_next_start(self, failure: Failure) -> None:
        """Chooses the slots of the next start.

        Args:
            failure: The failure for which all workers start again.
        """
        slot = self._slot_at_fault(failure)
        if slot is not None and self.leaves_out(failure):
            self._suspect_slots.add(slot)
            self._omitted_slot, self._failed_slot = slot, None
        else:
            self._omitted_slot, self._failed_slot = None, slot
        # Planned anew even if all take part: their ports may have been taken meanwhile.
        workers = self._plan(len(self._active))
        # Each worker keeps the GPUs of its slot: the GPUs of the omitted slot may be broken.
        self.workers = [
            dataclasses.replace(
                worker,
                environment={
                    **{k: v for k, v in worker.environment.items() if k != _GPUS},
                    **{k: v for k, v in self._all[s].environment.items() if k == _GPUS},
                },
            )
            for worker, s in zip(workers, self._active, strict=True)
        ]

    def _slot_at_fault(self, failure: Failure) -> int | None:
        """Returns the slot of the worker at fault; None if the failure does not tell it."""
        if failure.progress.preempted or failure.blames_peer:
            return None
        if failure.returncode != HUNG:
            return self._slot(failure.worker)
        # Who reports a hang is healthy.
        lost = (worker for worker in self.workers if worker.index == failure.lost_worker)
        return next(map(self._slot, lost), None)

    def _slot(self, worker: Worker) -> int:
        return self._active[list(self.workers).index(worker)]


def parse_elastic(text: str) -> tuple[int, int]:
    """Reads `min:max`, the least and the most workers of an elastic run.

    Args:
        text: The two numbers, such as "2:4".

    Raises:
        LaunchError: The text is malformed.

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
