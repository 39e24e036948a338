"""The thread that notices a hang, asks all workers for their status, and reports."""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
from collections.abc import Callable

from tfdist.cluster import heartbeat
from tfdist.cluster.key_value_store import KeyValueStore
from tfdist.errors import HUNG, HungError, PeerError
from tfdist.watchdog import diagnosis, ending
from tfdist.watchdog.diagnosis import LostWorker
from tfdist.watchdog.local import LocalStatus
from tfdist.watchdog.messages import ENDED, HangRequest, StatusMessage
from tfdist.watchdog.peers import STATUS_PREFIX, PeerStatuses, state_of
from tfdist.watchdog.progress import OUTSIDE, here
from tfdist.watchdog.settings import WatchdogSettings

_HANG = "hang"  # the key of the request that all workers read
_BEAT_S = 5.0  # between two status messages of a worker
_ASKED_S = 2.0  # between two readings of the request
_SUSPENDED_S = 6.0  # a longer pause of this thread means that the process was stopped
_CANNOT_ANSWER = ("T", "Z", "X", None)  # states of processes of this machine
_LEAD_S = 4.0  # the worker that wrote the report ends first, so that the launcher shows it


class Watcher:
    """Watches this process, and together with the other workers' watchers the whole run.

    Each watcher posts a status now and then. A watcher whose process makes no progress for
    too long requests the stacks of all workers. The first worker that answers writes the
    report for all.

    Args:
        settings: The limits.
        worker: This process's number.
        workers: How many workers there are.
        store: The key-value store for the status messages, or None.
    """

    def __init__(
        self,
        settings: WatchdogSettings,
        worker: int = 0,
        workers: int = 1,
        store: KeyValueStore | None = None,
    ) -> None:
        self.settings = settings
        self._worker = worker
        self._workers = workers
        self._store = store
        self._local = LocalStatus()
        self._last_post = 0.0
        self._last_read = 0.0
        self._peers = PeerStatuses()
        self._has_read_keeper = False
        self._answered_request = ""
        self._reported_since: float | None = None  # `here.since` at the last report
        self._has_written_report = False
        self._collective_failed = threading.Event()
        self._explained = threading.Event()
        self._lost: dict[int, LostWorker] = {}
        self._ask_servers: Callable[[], list[str]] = list
        self._unanswered: set[str] = set()  # servers that did not answer the last time
        self._silent: list[str] = []  # servers that did not answer twice in a row
        self._over = False
        atexit.register(self.close)
        threading.Thread(target=self._watch, name="tfdist-watch", daemon=True).start()

    def move(
        self,
        worker: int,
        workers: int,
        store: KeyValueStore | None,
        ask_servers: Callable[[], list[str]],
    ) -> None:
        """Changes to the place of another strategy.

        Args:
            worker: This process's number.
            workers: How many workers there are.
            store: The key-value store for the status messages.
            ask_servers: Returns the names of the servers that do not answer now.
        """
        self._ask_servers = ask_servers
        if (worker, workers, store) != (self._worker, self._workers, self._store):
            self._worker, self._workers, self._store = worker, workers, store
            self._has_read_keeper = False
            if self.settings.limit:
                self._post(self._local.now(worker, self.settings))

    def meet(self) -> None:
        """Reads the first status of the store's keeper: once it is lost, it cannot be read.

        Call it when all workers have posted a status, each in its first call.
        """
        if not self._has_read_keeper and self.settings.limit:
            self._read_keeper()
            self._has_read_keeper = True

    def explain(self, error: BaseException) -> PeerError | None:
        """Finds why a collective failed: a worker has ended, or lives but does not answer.

        Args:
            error: The collective's exception.

        Returns:
            The exception to raise in its place, or None.
        """
        if self._store is None or not self.settings.limit:
            return None
        statuses, _ = self._read_statuses(self._local.now(self._worker, self.settings))
        for status in statuses.values():
            if status.at == ENDED:
                cause = diagnosis.ended(status, [statuses[self._worker]])
                return PeerError(f"{cause.text} ({type(error).__name__})")
        if any(state_of(status) in (None, "Z", "X") for status in statuses.values()):
            return None  # a worker has ended, and its own output says why
        self._explained.clear()
        self._collective_failed.set()
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

    def close(self) -> None:
        """Stops watching, and tells the other workers that this process ends."""
        self._over = True
        self._say_if_run_continues()  # the last steps may be faster than the next look
        if self._store is None or not self.settings.limit or here.calls == 0:
            return
        self._post(self._local.ended(self._worker))

    # --- the thread ---------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._over:
            limit = self.settings.limit
            slept_at = time.monotonic()
            time.sleep(min(1.0, limit / 5) if limit else 1.0)
            now = time.monotonic()
            if now - slept_at > _SUSPENDED_S:
                # The whole process was stopped: that time does not count as work.
                here.since += now - slept_at
            if limit and not self._over:
                with contextlib.suppress(Exception):  # an error here must not end the training
                    self._check(now)

    def _check(self, now: float) -> None:
        status = self._local.now(self._worker, self.settings)
        beat = min(_BEAT_S, self.settings.limit / 4)
        if now - self._last_post > beat:
            self._post(status)
            self._last_post = now
            self._read_keeper()
        if now - self._last_read > min(_ASKED_S, beat):
            self._last_read = now
            self._handle_request()
        self._say_if_run_continues()
        if self._collective_failed.is_set():
            self._collective_failed.clear()
            self._request_report()
            self._explained.set()
        elif self._has_lost_server(status):
            self._request_report()
        elif status.idle > status.limit / 2 and status.at != OUTSIDE:
            statuses, lost = self._read_statuses(status)
            if (
                not status.is_overdue
                or status.is_debugged
                or self._unanswered - {*self._silent}
            ):
                return
            # `since` identifies the wait: it changes with each progress. A wait is reported
            # once, and may end the run only after its report.
            since = here.since
            if self._reported_since != since and not diagnosis.goes_on(
                statuses, lost, self._silent
            ):
                self._request_report()
            elif self._reported_since == since and self._is_at_end(status):
                self._end(f"Nothing has gone on for {status.idle:.0f} s.")

    def _has_lost_server(self, status: StatusMessage) -> bool:
        """Returns whether another server has not answered twice in a row."""
        if status.idle <= self.settings.limit or status.at == OUTSIDE or status.is_debugged:
            self._unanswered, self._silent = set(), []
            return False
        # A busy server may miss one question. So a server is lost if it misses two in a row.
        previous, silent_before = self._unanswered, self._silent
        self._unanswered = set(self._ask_servers())
        self._silent = sorted(previous & self._unanswered)
        return bool(self._silent) and self._silent != silent_before

    def _say_if_run_continues(self) -> None:
        if self._has_written_report and self._reported_since != here.since:
            self._has_written_report = False
            if here.at != OUTSIDE or not here.failed:
                ending.tell("tfdist: the run goes on.")

    def _is_at_end(self, status: StatusMessage) -> bool:
        lead = 0.0 if self._has_written_report else _LEAD_S
        return status.idle > self.settings.end_of(status.at, here.median) + lead

    def _handle_request(self) -> None:
        """Reads and follows the request of another worker's watcher."""
        text = None if self._store is None else self._store.read(_HANG)
        if text is None:
            return
        try:
            request = HangRequest.read(text)
        except ValueError:
            return
        if request.state == "end":
            self._leave(f"worker {request.by or 0}")
        elif request.name != self._answered_request and self._reported_since != here.since:
            self._answer(request.name)

    def _request_report(self) -> None:
        name = f"{self._worker} {time.time()}"
        if self._store is not None:
            self._store.post(_HANG, HangRequest(name, "ask").text())
        self._answer(name)

    def _answer(self, name: str) -> None:
        """Posts this worker's status, and reads the others. The first worker then reports.

        The watchers need no vote: the worker with the lowest number among those that answer
        writes the report. If two watchers have read different statuses, both may write one.
        """
        self._answered_request, self._reported_since = name, here.since
        self._has_written_report = False
        local = self._local.now(self._worker, self.settings, with_stack=True)
        asked_at = time.time()
        self._post(local)
        deadline = time.monotonic() + 2 * min(_ASKED_S, self._beat_s) + 2.0
        statuses, lost = self._read_statuses(local)
        while time.monotonic() < deadline and self._store is not None:
            settled = [
                status.stack or status.at == ENDED or state_of(status) in _CANNOT_ANSWER
                for status in statuses.values()
            ]
            if sum(map(bool, settled)) == self._workers:
                break
            time.sleep(0.3)
            statuses, lost = self._read_statuses(local)
        # A worker that has not answered by now is lost, even if its last status is recent.
        for worker, status in statuses.items():
            if status.clock < asked_at - 60 or (not status.stack and status.at != ENDED):
                lost.setdefault(
                    worker, LostWorker(time.time() - status.clock, state_of(status))
                )
        if not self._peers.keeper_answers:
            lost = self._peers.keeper_lost(self._store, self._worker)
        self._lost = lost
        if lost:
            heartbeat.here.record_lost(min(lost))  # for the launcher
        first = min((w for w in statuses if w not in lost), default=self._worker)
        if first != self._worker and self._peers.keeper_answers:
            ending.tell(f"tfdist: the run hangs. worker {first} has written the report.")
            return
        self._has_written_report = True
        self._report(statuses, lost)

    def _report(self, statuses: dict[int, StatusMessage], lost: dict[int, LostWorker]) -> None:
        missing = [f"worker {w}" for w in range(self._workers) if w not in statuses]
        is_certain = any(
            cause.certain for cause in diagnosis.causes(statuses, lost, self._silent)
        )
        text = ending.sentence(self.settings, statuses.values(), is_certain)
        ending.tell(diagnosis.report(statuses, lost, missing, self._silent, text))
        if is_certain:
            self._end()

    def _end(self, why: str = "") -> None:
        """Ends all workers, this one first: the launcher shows who ended first."""
        if not ending.may_end(self.settings):
            return
        if why:
            ending.tell(f"tfdist: {why} The run ends with status {HUNG}; its report is above.")
        if self._store is not None:
            request = HangRequest(self._answered_request, "end", self._worker)
            self._store.post(_HANG, request.text())
        os._exit(HUNG)

    def _leave(self, who: str) -> None:
        if not ending.may_end(self.settings):
            return
        time.sleep(1.0)
        ending.tell(
            f"tfdist: {who} has ended the run: it hangs. This worker ends too, with status "
            f"{HUNG}."
        )
        os._exit(HUNG)

    # --- status messages ----------------------------------------------------------------

    @property
    def _beat_s(self) -> float:
        return min(_BEAT_S, self.settings.limit / 4)

    def _post(self, status: StatusMessage) -> None:
        if self._store is not None:
            self._store.post(f"{STATUS_PREFIX}/{self._worker}", status.text())

    def _read_keeper(self) -> None:
        keeper = None if self._store is None else self._store.keeper
        if self._store is not None and keeper is not None and keeper != self._worker:
            self._peers.read(self._store, keeper)

    def _read_statuses(
        self, local: StatusMessage
    ) -> tuple[dict[int, StatusMessage], dict[int, LostWorker]]:
        return self._peers.read_all(self._store, local, self._beat_s)
