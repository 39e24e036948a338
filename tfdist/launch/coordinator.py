"""Where the launchers of all machines meet: a thread of the first one's.

It starts the workers of all machines together, ends them together when one fails or a
machine is lost, waits for a machine to come back, and decides when there is nothing more to
try.
"""

from __future__ import annotations

import hmac
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tfdist.errors import START_ME_AGAIN, LaunchError
from tfdist.launch.hosts import Host
from tfdist.launch.protocol import BEAT_S, SILENCE_S, Wire, proof
from tfdist.launch.restarts import RestartCause, Restarts

_TICK_S = 0.1
# How long a failure that only blames a peer waits for that peer's own.
_PEER_FAILURE_S = 2.0
_FAREWELL_S = 5.0
_INTERRUPTED = 130


@dataclass
class _Caller:
    """A connection, and after its hello the launcher of a machine."""

    wire: Wire
    nonce: str = field(default_factory=lambda: secrets.token_hex(16))
    heard: float = field(default_factory=time.monotonic)
    rank: int | None = None
    identity: str = ""
    is_ready: bool = False
    is_done: bool = False


class Coordinator:
    """The meeting point.

    Args:
        port: Where it listens.
        hosts: The machines.
        settings: What must be the same on all of them.
        restarts: How often they may start again.
        limit: Seconds that a machine may take to come, or to come back.
        least: Workers with which to go on when one does not; None if all are needed.
    """

    def __init__(
        self,
        port: int,
        hosts: Sequence[Host],
        settings: dict[str, Any],
        restarts: Restarts,
        limit: float,
        least: int | None = None,
    ) -> None:
        self._hosts, self._settings = hosts, settings
        self._restarts, self._limit = restarts, limit
        self._least = least
        self._active: set[int] = set()
        self._callers: list[_Caller] = []
        self._causes: list[RestartCause] = []
        self._failed_at = 0.0
        self._phase, self._since, self._beat = "meeting", time.monotonic(), 0.0
        self._closing = False
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._listener.bind(("", port))
        except OSError as error:
            self._listener.close()
            raise LaunchError(
                "The port at which the launchers of all hosts meet must be free on the first. "
                f"Received: port {port}, one below --port ({error.strerror}). Choose another "
                "--port, the same on every host."
            ) from None
        self._listener.listen()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._thread = threading.Thread(
            target=self._serve, name="tfdist-coordinator", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Ends it, after a moment in which all can hear how the run has ended."""
        self._closing = True
        self._thread.join(_FAREWELL_S + 2)

    def _serve(self) -> None:
        ends: float | None = None
        while True:
            for key, _ in self._selector.select(_TICK_S):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._read(key.data)
            now = time.monotonic()
            for caller in list(self._callers):
                if not caller.wire.is_open or now - caller.heard > SILENCE_S:
                    self._drop(caller)
            if now - self._beat > BEAT_S:
                self._tell_all("alive")
                self._beat = now
            if self._phase == "meeting":
                self._meet(now)
            elif self._phase == "running":
                self._run(now)
            if self._closing:
                ends = ends or now + _FAREWELL_S
                if not self._callers or self._phase != "over" or now > ends:
                    break
        for caller in list(self._callers):
            caller.wire.close()
        self._listener.close()
        self._selector.close()

    # --- connections --------------------------------------------------------------------

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        caller = _Caller(Wire(connection))
        self._callers.append(caller)
        self._selector.register(connection, selectors.EVENT_READ, caller)
        caller.wire.send("welcome", nonce=caller.nonce)

    def _drop(self, caller: _Caller) -> None:
        self._callers.remove(caller)
        self._selector.unregister(caller.wire.socket)
        caller.wire.close()
        is_needed = caller.rank in self._active and not caller.is_done
        if caller.rank is not None and self._phase == "running" and is_needed:
            self._note(
                RestartCause(
                    f"{self._name(caller.rank)} is lost: its launcher does not answer.",
                    "while running",
                    time.time(),
                    START_ME_AGAIN,
                )
            )

    def _read(self, caller: _Caller) -> None:
        try:
            for message in caller.wire.received():
                caller.heard = time.monotonic()
                if message["kind"] == "hello":
                    self._greet(caller, message)
                elif caller.rank is not None:
                    self._hear(caller, message)
        except (KeyError, TypeError, ValueError):
            caller.wire.is_open = False  # it is no launcher of ours

    def _greet(self, caller: _Caller, hello: dict[str, Any]) -> None:
        problem = self._refusal(caller, hello)
        if problem is not None:
            caller.wire.send("refused", why=problem)
            return
        for other in self._callers:
            if other.rank == hello["rank"]:
                other.rank = None  # it has come back before its loss was noticed
                other.heard = 0.0
        caller.rank, caller.identity = hello["rank"], hello["identity"]
        known = [RestartCause.from_json(one) for one in hello["restarts"]]
        if len(known) > len(self._restarts.made):  # the first machine itself was lost
            self._restarts.adopt(known)
        if self._phase == "running" and caller.rank in self._active and not self._causes:
            self._note(self._came_back(caller.rank))

    def _came_back(self, rank: int) -> RestartCause:
        what = f"{self._name(rank)} has come back, and was not there."
        return RestartCause(what, "while running", time.time(), START_ME_AGAIN)

    def _refusal(self, caller: _Caller, hello: dict[str, Any]) -> str | None:
        if not hmac.compare_digest(str(hello.get("proof")), proof(caller.nonce)):
            return (
                "TFDIST_TOKEN must be the same on all hosts. Received: another one, or none. "
                "Set it for every launcher."
            )
        rank, theirs = hello.get("rank"), hello.get("settings", {})
        for name in sorted({*self._settings, *theirs}):
            mine, other = self._settings.get(name), theirs.get(name)
            if mine != other:
                return (
                    f"`{name}` must be the same on all hosts. Received: {mine!r} on node 0, "
                    f"{other!r} on node {rank}. Make them alike and start that node again."
                )
        if not isinstance(rank, int) or not 0 <= rank < len(self._hosts):
            return f"`--node-rank` must be one of the hosts'. Received: {rank!r}."
        for other_caller in self._callers:
            if (
                other_caller.rank == rank
                and other_caller.identity != hello["identity"]
                and time.monotonic() - other_caller.heard < 3 * BEAT_S
            ):
                return (
                    f"Each node must be started once. Received: --node-rank {rank} twice, "
                    "and the first one answers. Choose another --node-rank."
                )
        return None

    # --- the run ------------------------------------------------------------------------

    def _hear(self, caller: _Caller, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "ready":
            caller.is_ready, caller.is_done = True, False
        elif kind == "done" and self._phase == "running":
            caller.is_done = True
        elif kind == "failed" and self._phase == "running":
            self._note(RestartCause.from_json(message["cause"]))
        elif kind == "bye":
            rank, status = caller.rank, message["status"]
            caller.rank = None
            if self._phase != "over" and rank is not None and rank in self._active:
                what = f"{self._name(rank)} was ended by a signal to its launcher."
                self._note(
                    RestartCause(
                        what,
                        "while running",
                        time.time(),
                        status,
                        is_final=status == _INTERRUPTED,
                    )
                )

    def _note(self, cause: RestartCause) -> None:
        if not self._causes:
            self._failed_at = time.monotonic()
        self._causes.append(cause)

    def _meet(self, now: float) -> None:
        final = [cause for cause in self._causes if cause.is_final]
        if final:
            self._end("over", final[0])
            return
        ready = {c.rank for c in self._callers if c.is_ready and c.rank is not None}
        missing = [rank for rank in range(len(self._hosts)) if rank not in ready]
        is_late = now - self._since > self._limit
        if not missing or (is_late and self._is_enough(ready)):
            self._causes = []
            self._phase, self._active = "running", ready
            for caller in self._callers:
                if caller.rank in ready:
                    caller.is_ready = False
                    caller.wire.send("start", active=sorted(ready))
        elif is_late:
            listed = " and ".join(self._name(rank) for rank in missing)
            self._end(
                "over",
                RestartCause(
                    f"{listed} did not come within {self._limit:g} s (--node-timeout).",
                    "while waiting for all hosts",
                    time.time(),
                    START_ME_AGAIN,
                    is_final=True,
                ),
            )

    def _is_enough(self, ready: set[int]) -> bool:
        workers = sum(self._hosts[rank].slots for rank in ready)
        return self._least is not None and 0 in ready and workers >= self._least

    def _run(self, now: float) -> None:
        if self._causes:
            cause = min(self._causes, key=lambda c: c.blames_peer)
            if cause.blames_peer and now - self._failed_at < _PEER_FAILURE_S:
                return
            if self._restarts.allows(cause):
                self._restarts.note(cause, "")
                self._end("again", cause)
            else:
                self._end("over", cause)
        elif all(caller.is_done for caller in self._callers if caller.rank in self._active):
            self._end("over", None)

    def _end(self, kind: str, cause: RestartCause | None) -> None:
        repeated = kind == "over" and cause is not None and self._restarts.repeats(cause)
        told = None if cause is None else cause.to_json()
        self._phase = "meeting" if kind == "again" else "over"
        self._since, self._causes = time.monotonic(), []
        for caller in self._callers:
            # Those that came meanwhile have nothing to end.
            if kind == "over" or caller.rank in self._active:
                caller.is_ready = False
                caller.wire.send(kind, cause=told, repeated=repeated)

    def _tell_all(self, kind: str, **fields: Any) -> None:
        for caller in self._callers:
            caller.wire.send(kind, **fields)

    def _name(self, rank: int) -> str:
        return f"node {rank} ({self._hosts[rank].name})"
