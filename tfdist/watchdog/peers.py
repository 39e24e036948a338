"""The last status of the other workers, and which of them do not answer."""

from __future__ import annotations

import socket
import time

from tfdist.cluster.key_value_store import KeyValueStore
from tfdist.watchdog import memory
from tfdist.watchdog.diagnosis import LostWorker
from tfdist.watchdog.messages import ENDED, StatusMessage

STATUS_PREFIX = "watch"
"""The names of the status messages in the key-value store begin with it."""

_BEATS_MISSED = 3


def state_of(status: StatusMessage) -> str | None:
    """Returns the state of a worker's process as in `ps`; "?" if it is on another machine.

    Args:
        status: The worker's last status.
    """
    return memory.state_of(status.pid) if status.host == socket.gethostname() else "?"


class PeerStatuses:
    """The last status of each worker, and when it came.

    Attributes:
        keeper_answers: Whether the key-value store could be read.
    """

    def __init__(self) -> None:
        self.keeper_answers = True
        # The last status of each worker, and the time at which it was read first.
        self._statuses: dict[int, tuple[StatusMessage, float]] = {}

    def read(self, store: KeyValueStore, worker: int) -> None:
        """Reads a worker's status.

        Args:
            store: The key-value store.
            worker: The worker's number.
        """
        text = store.read(f"{STATUS_PREFIX}/{worker}")
        if text is not None:
            self._record(worker, text)

    def read_all(
        self, store: KeyValueStore | None, local: StatusMessage, beat: float
    ) -> tuple[dict[int, StatusMessage], dict[int, LostWorker]]:
        """Returns the last status of each worker, and the workers that do not answer.

        Args:
            store: The key-value store.
            local: This worker's status.
            beat: Seconds between two messages of a worker.
        """
        now = time.monotonic()
        texts = {} if store is None else store.read_all(STATUS_PREFIX)
        self.keeper_answers = store is None or bool(texts)
        for worker, text in texts.items():
            self._record(worker, text)
        self._statuses[local.worker] = (local, now)
        silence = max(2.0, _BEATS_MISSED * beat)
        lost = {
            worker: LostWorker(max(now - read_at, time.time() - status.clock), state_of(status))
            for worker, (status, read_at) in self._statuses.items()
            if now - read_at > silence and status.at != ENDED
        }
        if not self.keeper_answers:
            lost = self.keeper_lost(store, local.worker)
        return {worker: status for worker, (status, _) in self._statuses.items()}, lost

    def keeper_lost(self, store: KeyValueStore | None, worker: int) -> dict[int, LostWorker]:
        """Returns the keeper of a store that does not answer; nothing is known of the others.

        Args:
            store: The store.
            worker: This worker's number.
        """
        keeper = None if store is None else store.keeper
        if keeper is None or keeper == worker or keeper not in self._statuses:
            return {}
        status, read_at = self._statuses[keeper]
        return {keeper: LostWorker(time.monotonic() - read_at, state_of(status))}

    def _record(self, worker: int, text: str) -> None:
        try:
            status = StatusMessage.read(text)
        except ValueError:
            return  # what is no message says nothing about its worker
        if status.worker != worker:
            return
        previous = self._statuses.get(worker)
        if previous is None or (previous[0].beat, previous[0].pid) != (status.beat, status.pid):
            self._statuses[worker] = (status, time.monotonic())
