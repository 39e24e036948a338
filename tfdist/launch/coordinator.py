"""The coordinator of the launchers of all machines: a thread in the first machine's launcher.

It starts the workers of all machines together, and ends them together when a worker fails or
a machine is lost. It waits for a lost machine to come back, and decides when the run is over.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Sequence
from typing import Any

from tfdist.errors import START_ME_AGAIN
from tfdist.launch.callers import Caller, Callers
from tfdist.launch.hosts import Host
from tfdist.launch.messages import Message
from tfdist.launch.protocol import BEAT_S
from tfdist.launch.restarts import RestartCause, Restarts

_TICK_S = 0.1
# If a failure only blames a peer, the coordinator waits this long for the peer's own failure.
_PEER_FAILURE_S = 2.0
_FAREWELL_S = 5.0
_INTERRUPTED = 130


class Coordinator:
    """Decides for the launchers of all machines when to start, to start again and to end.

    Args:
        port: The port to listen on.
        token: The token of the run.
        hosts: The machines.
        settings: Settings that must be the same on all machines.
        restarts: How often the workers may start again.
        limit: Seconds that a machine may take to come, or to come back.
        min_workers: The least workers that start without a missing machine; None if all
            machines are needed.

    Raises:
        LaunchError: The port is in use.
    """

    def __init__(
        self,
        port: int,
        token: str,
        hosts: Sequence[Host],
        settings: dict[str, Any],
        restarts: Restarts,
        limit: float,
        min_workers: int | None = None,
    ) -> None:
        self._hosts, self._settings = hosts, settings
        self._restarts, self._limit = restarts, limit
        self._min_workers = min_workers
        self._active: set[int] = set()
        self._refusals: dict[int, str] = {}  # the last one of each machine
        self._causes: list[RestartCause] = []
        self._failed_at = 0.0
        self._phase, self._since, self._beat = "meeting", time.monotonic(), 0.0
        self._closing = False
        self._callers = Callers(port, token)
        self._thread = threading.Thread(
            target=self._serve, name="tfdist-coordinator", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Ends the coordinator, once all launchers have heard how the run ended."""
        self._closing = True
        self._thread.join(_FAREWELL_S + 2)

    @property
    def _launchers(self) -> list[Caller]:
        return self._callers.all

    def _serve(self) -> None:
        ends: float | None = None
        while True:
            for launcher, message in self._callers.messages(_TICK_S):
                self._take(launcher, message)
            for launcher in self._callers.drop_lost():
                self._note_loss(launcher)
            now = time.monotonic()
            if now - self._beat > BEAT_S:
                self._send_to_all("alive")
                self._beat = now
            if self._phase == "meeting":
                self._meet(now)
            elif self._phase == "running":
                self._run(now)
            if self._closing:
                ends = ends or now + _FAREWELL_S
                has_launchers = any(c.connection.is_admitted for c in self._launchers)
                if not has_launchers or self._phase != "over" or now > ends:
                    break
        self._callers.close()

    # --- launchers ----------------------------------------------------------------------

    def _take(self, launcher: Caller, message: Message) -> None:
        try:
            if message["kind"] == "join":
                self._join(launcher, message)
            elif launcher.rank is not None:
                self._handle(launcher, message)
        except Exception:
            # A mistake here must not end the run: it costs this launcher its connection.
            print("tfdist: error in the launchers' coordinator:", file=sys.stderr)
            traceback.print_exc()
            launcher.connection.is_open = False

    def _note_loss(self, launcher: Caller) -> None:
        is_needed = launcher.rank in self._active and not launcher.is_done
        if launcher.rank is not None and self._phase == "running" and is_needed:
            self._record_cause(
                RestartCause(
                    f"{self._name(launcher.rank)} is lost: its launcher does not answer.",
                    "while running",
                    time.time(),
                    START_ME_AGAIN,
                )
            )

    def _join(self, launcher: Caller, join: Message) -> None:
        problem = self._refusal(join)
        if problem is not None:
            self._refusals[join["rank"]] = problem
            launcher.connection.send("refused", why=problem)
            return
        for other in self._launchers:
            if other.rank == join["rank"] and other is not launcher:
                other.rank = None  # the machine came back before its loss was noticed
                other.last_message_at = 0.0
        launcher.rank, launcher.identity = join["rank"], join["identity"]
        earlier_causes = [RestartCause.from_json(fields) for fields in join["restarts"]]
        if len(earlier_causes) > len(self._restarts.history):
            # The first machine itself was lost, so this coordinator is new.
            self._restarts.adopt(earlier_causes)
        if self._phase == "running" and launcher.rank in self._active and not self._causes:
            self._record_cause(self._return_of(launcher.rank))

    def _return_of(self, rank: int) -> RestartCause:
        text = f"{self._name(rank)} was lost and has come back."
        return RestartCause(text, "while running", time.time(), START_ME_AGAIN)

    def _refusal(self, join: Message) -> str | None:
        rank, peer_settings = join["rank"], join["settings"]
        for name in sorted({*self._settings, *peer_settings}):
            local_value, peer_value = self._settings.get(name), peer_settings.get(name)
            if local_value != peer_value:
                return (
                    f"`{name}` must be the same on all hosts. Received: {local_value!r} on "
                    f"node 0, {peer_value!r} on node {rank}. Make them alike and start that "
                    "node again."
                )
        if not 0 <= rank < len(self._hosts):
            return f"`--node-rank` must be one of the hosts'. Received: {rank!r}."
        for other in self._launchers:
            if (
                other.rank == rank
                and other.identity != join["identity"]
                and time.monotonic() - other.last_message_at < 3 * BEAT_S
            ):
                return (
                    f"Each node must be started once. Received: --node-rank {rank} twice, "
                    "and the first one answers. Choose another --node-rank."
                )
        return None

    # --- the run ------------------------------------------------------------------------
    #
    # Meeting: each launcher says "ready". When all are (or enough, after the limit), they get
    # "start". Running: a launcher says "done" or "failed", or is lost. The first cause that
    # does not only blame a peer decides. "again" leads back to the meeting, "over" ends the
    # run. All launchers get the same decision, so none of them restarts alone.

    def _handle(self, launcher: Caller, message: Message) -> None:
        kind = message["kind"]
        if kind == "ready":
            launcher.is_ready, launcher.is_done = True, False
        elif kind == "done" and self._phase == "running":
            launcher.is_done = True
        elif kind == "failed" and self._phase == "running":
            self._record_cause(RestartCause.from_json(message["cause"]))
        elif kind == "bye":
            rank, status = launcher.rank, message["status"]
            launcher.rank = None
            if self._phase != "over" and rank is not None and rank in self._active:
                text = f"{self._name(rank)} was ended by a signal to its launcher."
                self._record_cause(
                    RestartCause(
                        text,
                        "while running",
                        time.time(),
                        status,
                        is_final=status == _INTERRUPTED,
                    )
                )

    def _record_cause(self, cause: RestartCause) -> None:
        if not self._causes:
            self._failed_at = time.monotonic()
        self._causes.append(cause)

    def _meet(self, now: float) -> None:
        final = [cause for cause in self._causes if cause.is_final]
        if final:
            self._end("over", final[0])
            return
        ready = {c.rank for c in self._launchers if c.is_ready and c.rank is not None}
        missing = [rank for rank in range(len(self._hosts)) if rank not in ready]
        is_late = now - self._since > self._limit
        if not missing or (is_late and self._is_enough(ready)):
            self._causes = []  # of the start before
            self._phase, self._active = "running", ready
            for launcher in self._launchers:
                if launcher.rank in ready:
                    launcher.is_ready = False
                    launcher.connection.send("start", active=sorted(ready))
        elif is_late:
            listed = " and ".join(self._name(rank) for rank in missing)
            refusals = "".join(
                f" {self._name(rank)} was refused: {self._refusals[rank]}"
                for rank in missing
                if rank in self._refusals
            )
            self._end(
                "over",
                RestartCause(
                    f"{listed} did not come within {self._limit:g} s (--node-timeout)."
                    + refusals,
                    "while waiting for all hosts",
                    time.time(),
                    START_ME_AGAIN,
                    is_final=True,
                ),
            )

    def _is_enough(self, ready: set[int]) -> bool:
        workers = sum(self._hosts[rank].slots for rank in ready)
        return self._min_workers is not None and 0 in ready and workers >= self._min_workers

    def _run(self, now: float) -> None:
        if self._causes:
            # A worker often notices that its peer is lost before the peer's launcher reports
            # why. So a cause that only blames a peer waits a moment for a better one.
            cause = min(self._causes, key=lambda c: c.blames_peer)
            if cause.blames_peer and now - self._failed_at < _PEER_FAILURE_S:
                return
            if self._restarts.allows(cause):
                self._restarts.record(cause, "")
                self._end("again", cause)
            else:
                self._end("over", cause)
        elif all(
            launcher.is_done for launcher in self._launchers if launcher.rank in self._active
        ):
            self._end("over", None)

    def _end(self, kind: str, cause: RestartCause | None) -> None:
        repeated = kind == "over" and cause is not None and self._restarts.repeats(cause)
        cause_fields = None if cause is None else cause.to_json()
        self._phase = "meeting" if kind == "again" else "over"
        self._since, self._causes = time.monotonic(), []
        for launcher in self._launchers:
            # Machines that came while the others ran have no workers to end.
            if kind == "over" or launcher.rank in self._active:
                launcher.is_ready = False
                launcher.connection.send(kind, cause=cause_fields, repeated=repeated)

    def _send_to_all(self, kind: str, **fields: Any) -> None:
        for launcher in self._launchers:
            if launcher.connection.is_admitted:
                launcher.connection.send(kind, **fields)

    def _name(self, rank: int) -> str:
        return f"node {rank} ({self._hosts[rank].name})"
