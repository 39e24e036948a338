"""The thread that notices that nothing goes on, asks all workers, and reports."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable

from tfdist.cluster.key_value_store import KeyValueStore
from tfdist.errors import HUNG, HungError, PeerError
from tfdist.watchdog import diagnosis
from tfdist.watchdog.diagnosis import Lost
from tfdist.watchdog.local import Oneself
from tfdist.watchdog.messages import ENDED, StatusMessage
from tfdist.watchdog.peers import NOTE, Others, state_of
from tfdist.watchdog.progress import OUTSIDE, here
from tfdist.watchdog.settings import Settings

_HANG = "hang"
_BEAT_S = 5.0
_ASKED_S = 2.0
_SUSPENDED_S = 6.0
_LEAD_S = 4.0  # of the worker that wrote the report: the launcher shows who ends first


class Watcher:
    """Watches this process, and with the watchers of the others the run.

    Each posts where it is now and then. One that is too long at the same asks all for their
    stacks; the first that answers writes the report for all.

    Args:
        settings: How long is too long.
        worker: This process's number.
        workers: How many there are.
        store: Where they leave notes, if there is one.
    """

    def __init__(
        self,
        settings: Settings,
        worker: int = 0,
        workers: int = 1,
        store: KeyValueStore | None = None,
    ) -> None:
        self.settings = settings
        self._worker = worker
        self._workers = workers
        self._store = store
        self._oneself = Oneself()
        self._posted = 0.0
        self._looked = 0.0
        self._others = Others()
        self._knows_keeper = False
        self._answered = ""
        self._reported: float | None = None  # the piece that was reported, by its beginning
        self._wrote = False
        self._failed = threading.Event()
        self._explained = threading.Event()
        self._lost: dict[int, Lost] = {}
        self._ask_servers: Callable[[], list[str]] = list
        self._unheard: set[str] = set()  # servers, when they were asked last
        self._silent: list[str] = []  # and those that were not heard twice in turn
        self._over = False
        atexit.register(self._say_ended)
        threading.Thread(target=self._watch, name="tfdist-watch", daemon=True).start()

    def move(
        self,
        worker: int,
        workers: int,
        store: KeyValueStore | None,
        ask_servers: Callable[[], list[str]],
    ) -> None:
        """Watches another place: that of the strategy that is used now.

        Args:
            worker: This process's number.
            workers: How many there are.
            store: Where they leave notes.
            ask_servers: Names the servers that do not answer now.
        """
        self._ask_servers = ask_servers
        if (worker, workers, store) != (
            self._worker,
            self._workers,
            self._store,
        ):
            self._worker, self._workers, self._store = (
                worker,
                workers,
                store,
            )
            self._knows_keeper = False
            if self.settings.limit:
                self._post(self._oneself.note(worker, self.settings))

    def meet(self) -> None:
        """Reads the first note of the store's keeper, which could not be asked when lost.

        To be called once all workers have posted theirs: each by its first call.
        """
        if not self._knows_keeper and self.settings.limit:
            self._read_keeper()
            self._knows_keeper = True

    def explain(self, error: BaseException) -> PeerError | None:
        """Says why a collective failed: a worker has ended, or lives and does not answer.

        Args:
            error: What the collective raised.

        Returns:
            What to raise in its place, or None.
        """
        if self._store is None or not self.settings.limit:
            return None
        notes, _ = self._everyone(self._oneself.note(self._worker, self.settings))
        for note in notes.values():
            if note.at == ENDED:
                cause = diagnosis.ended(note, [notes[self._worker]])
                return PeerError(f"{cause.text} ({type(error).__name__})")
        if any(state_of(note) in (None, "Z", "X") for note in notes.values()):
            return None  # its own output says why
        self._explained.clear()
        self._failed.set()
        self._explained.wait(30.0)
        stopped = [w for w, lost in self._lost.items() if lost.state not in (None, "Z", "X")]
        if not stopped:
            return None
        listed = " and ".join(f"worker {w}" for w in stopped)
        return HungError(
            f"All workers must answer until training ends. Received: none of {listed} for "
            f"{max(self._lost[w].seconds for w in stopped):.0f} s "
            f"({type(error).__name__}). See the report above."
        )

    # --- the thread ---------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._over:
            limit = self.settings.limit
            before = time.monotonic()
            time.sleep(min(1.0, limit / 5) if limit else 1.0)
            now = time.monotonic()
            if now - before > _SUSPENDED_S:
                # The whole process was stopped; that is not the time of what it is at.
                here.since += now - before
            if limit and not self._over:
                with contextlib.suppress(Exception):  # a watcher must not end what it watches
                    self._tick(now)

    def _tick(self, now: float) -> None:
        note = self._oneself.note(self._worker, self.settings)
        beat = min(_BEAT_S, self.settings.limit / 4)
        if now - self._posted > beat:
            self._post(note)
            self._posted = now
            self._read_keeper()
        if now - self._looked > min(_ASKED_S, beat):
            self._looked = now
            self._hear()
        self._say_if_it_goes_on()
        if self._failed.is_set():
            self._failed.clear()
            self._ask()
            self._explained.set()
        elif self._is_served_no_more(note):
            self._ask()
        elif note.idle > note.limit / 2 and note.at != OUTSIDE:
            notes, lost = self._everyone(note)
            if not note.is_overdue or note.is_debugged or self._unheard - {*self._silent}:
                return
            since = here.since
            if self._reported != since and not diagnosis.goes_on(notes, lost, self._silent):
                self._ask()
            elif self._reported == since and self._is_at_end(note):
                self._end(f"Nothing has gone on for {note.idle:.0f} s.")

    def _is_served_no_more(self, note: StatusMessage) -> bool:
        """Tells whether a server of this process is silent, twice in turn."""
        if note.idle <= self.settings.limit or note.at == OUTSIDE or note.is_debugged:
            self._unheard, self._silent = set(), []
            return False
        before, known = self._unheard, self._silent
        self._unheard = set(self._ask_servers())
        self._silent = sorted(before & self._unheard)
        return bool(self._silent) and self._silent != known

    def _say_if_it_goes_on(self) -> None:
        if self._wrote and self._reported != here.since:
            self._wrote = False
            print("tfdist: the run goes on.", file=sys.stderr, flush=True)

    def _is_at_end(self, note: StatusMessage) -> bool:
        lead = 0.0 if self._wrote else _LEAD_S
        return note.idle > self.settings.end_of(note.at, here.median) + lead

    def _hear(self) -> None:
        """Does what another worker's watcher asked for."""
        text = None if self._store is None else self._store.read(_HANG)
        if text is None:
            return
        asked = json.loads(text)
        if asked["state"] == "end":
            self._leave("worker 0" if asked["by"] is None else f"worker {asked['by']}")
        elif asked["name"] != self._answered and self._reported != here.since:
            self._answer(asked["name"])

    def _ask(self) -> None:
        name = f"{self._worker} {time.time()}"
        if self._store is not None:
            self._store.post(_HANG, json.dumps({"name": name, "state": "ask"}))
        self._answer(name)

    def _answer(self, name: str) -> None:
        """Tells where this worker is, hears the others, and reports if it is the first."""
        self._answered, self._reported, self._wrote = name, here.since, False
        mine = self._oneself.note(self._worker, self.settings, with_stack=True)
        asked = time.time()
        self._post(mine)
        deadline = time.monotonic() + 2 * min(_ASKED_S, self._beat_s) + 2.0
        notes, lost = self._everyone(mine)
        while time.monotonic() < deadline and self._store is not None:
            answered = [w for w, note in notes.items() if note.stack or note.at == ENDED]
            if len(answered) == self._workers:
                break
            time.sleep(0.3)
            notes, lost = self._everyone(mine)
        # Who has not answered by now is lost, whenever its last note was seen.
        for worker, note in notes.items():
            if note.clock < asked - 60 or (not note.stack and note.at != ENDED):
                lost.setdefault(worker, Lost(time.time() - note.clock, state_of(note)))
        if not self._others.keeper_answers:
            lost = self._others.keeper_lost(self._store, self._worker)
        self._lost = lost
        first = min((w for w in notes if w not in lost), default=self._worker)
        if first != self._worker and self._others.keeper_answers:
            print(
                f"tfdist: the run hangs. worker {first} has written the report.",
                file=sys.stderr,
                flush=True,
            )
            return
        self._wrote = True
        self._report(notes, lost)

    def _report(self, notes: dict[int, StatusMessage], lost: dict[int, Lost]) -> None:
        missing = [f"worker {w}" for w in range(self._workers) if w not in notes]
        is_certain = any(cause.certain for cause in diagnosis.causes(notes, lost, self._silent))
        ends = self._may_end and is_certain
        ending = f"The run ends with status {HUNG}."
        if self._may_end and not ends:
            longest = max((note.idle for note in notes.values() if note.is_overdue), default=0)
            end = self.settings.end_of(here.at, here.median)
            ending = (
                f"It may still go on. If not within {max(0.0, end - longest):.0f} s, it ends "
                f"with status {HUNG} (TFDIST_HANG_LIMIT={self.settings.limit:g})."
            )
        elif not self._may_end:
            ending = "It is not ended: " + (
                f"TFDIST_ON_HANG={self.settings.on_hang}."
                if self.settings.on_hang != "end"
                else "this is an interactive session, or a debugger is attached."
            )
        text = diagnosis.report(notes, lost, missing, self._silent, ending)
        print(text, file=sys.stderr, flush=True)
        if ends:
            self._end()

    @property
    def _may_end(self) -> bool:
        interactive = hasattr(sys, "ps1") or "ipykernel" in sys.modules
        return self.settings.on_hang == "end" and not interactive and not here.traced

    def _end(self, why: str = "") -> None:
        """Ends all workers, this one first: the launcher shows who ended first."""
        if not self._may_end:
            return
        if why:
            print(
                f"tfdist: {why} The run ends with status {HUNG}; its report is above.",
                file=sys.stderr,
                flush=True,
            )
        if self._store is not None:
            said = {"name": self._answered, "state": "end", "by": self._worker}
            self._store.post(_HANG, json.dumps(said))
        os._exit(HUNG)

    def _leave(self, who: str) -> None:
        if not self._may_end:
            return
        time.sleep(1.0)
        print(
            f"tfdist: {who} has ended the run: it hangs. This worker ends too, with status "
            f"{HUNG}.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(HUNG)

    # --- notes --------------------------------------------------------------------------

    @property
    def _beat_s(self) -> float:
        return min(_BEAT_S, self.settings.limit / 4)

    def _post(self, note: StatusMessage) -> None:
        if self._store is not None:
            self._store.post(f"{NOTE}/{self._worker}", note.text())

    def _read_keeper(self) -> None:
        keeper = None if self._store is None else self._store.keeper
        if self._store is not None and keeper is not None and keeper != self._worker:
            self._others.read(self._store, keeper)

    def _everyone(
        self, mine: StatusMessage
    ) -> tuple[dict[int, StatusMessage], dict[int, Lost]]:
        return self._others.everyone(self._store, mine, self._beat_s)

    def _say_ended(self) -> None:
        self._over = True
        self._say_if_it_goes_on()
        if self._store is None or not self.settings.limit or here.calls == 0:
            return
        self._post(self._oneself.ended(self._worker))
