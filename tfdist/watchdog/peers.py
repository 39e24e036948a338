"""What the watchers of the other workers said last, and which of them do not answer."""

from __future__ import annotations

import socket
import time

from tfdist.cluster.key_value_store import KeyValueStore
from tfdist.watchdog import memory
from tfdist.watchdog.diagnosis import Lost
from tfdist.watchdog.messages import ENDED, StatusMessage

NOTE = "watch"
"""How the names of the notes on the key-value store begin."""

_BEATS_MISSED = 3


def state_of(note: StatusMessage) -> str | None:
    """Gives the state of a note's process as in `ps`; "?" if it is on another machine.

    Args:
        note: Its last.
    """
    return memory.state_of(note.pid) if note.host == socket.gethostname() else "?"


class Others:
    """The notes that were seen, and when.

    Attributes:
        keeper_answers: Whether the key-value store could be read.
    """

    def __init__(self) -> None:
        self.keeper_answers = True
        self._seen: dict[
            int, tuple[StatusMessage, float]
        ] = {}  # and when a new one was seen first

    def read(self, store: KeyValueStore, worker: int) -> None:
        """Reads a worker's note.

        Args:
            store: Where it is.
            worker: Whose.
        """
        text = store.read(f"{NOTE}/{worker}")
        if text is not None:
            self._see(worker, text)

    def everyone(
        self, store: KeyValueStore | None, mine: StatusMessage, beat: float
    ) -> tuple[dict[int, StatusMessage], dict[int, Lost]]:
        """Gives what the workers said last, and which of them do not answer.

        Args:
            store: Where their notes are.
            mine: This worker's.
            beat: Seconds between a worker's notes.
        """
        now = time.monotonic()
        texts = {} if store is None else store.read_all(NOTE)
        self.keeper_answers = store is None or bool(texts)
        for worker, text in texts.items():
            self._see(worker, text)
        self._seen[mine.worker] = (mine, now)
        missed = max(2.0, _BEATS_MISSED * beat)
        lost = {
            worker: Lost(max(now - seen, time.time() - note.clock), state_of(note))
            for worker, (note, seen) in self._seen.items()
            if now - seen > missed and note.at != ENDED
        }
        if not self.keeper_answers:
            lost = self.keeper_lost(store, mine.worker)
        return {worker: note for worker, (note, _) in self._seen.items()}, lost

    def keeper_lost(self, store: KeyValueStore | None, own: int) -> dict[int, Lost]:
        """Gives the worker that keeps the store, which is gone: nothing is known of the others.

        Args:
            store: That does not answer.
            own: This worker's number.
        """
        keeper = None if store is None else store.keeper
        if keeper is None or keeper == own or keeper not in self._seen:
            return {}
        note, seen = self._seen[keeper]
        return {keeper: Lost(time.monotonic() - seen, state_of(note))}

    def _see(self, worker: int, text: str) -> None:
        note, known = StatusMessage.read(text), self._seen.get(worker)
        if known is None or (known[0].beat, known[0].pid) != (note.beat, note.pid):
            self._seen[worker] = (note, time.monotonic())
