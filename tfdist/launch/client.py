"""A launcher's connection to the meeting point of all, and what it is told there."""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tfdist.errors import START_ME_AGAIN, LaunchError
from tfdist.launch.protocol import BEAT_S, SILENCE_S, Wire, proof
from tfdist.launch.restarts import RestartCause, Restarts

_TRY_S = 0.5
_REMIND_S = 30.0


@dataclass(frozen=True)
class News:
    """What all launchers do now.

    Attributes:
        again: Whether all workers are started again; else the run is over.
        cause: Why; None where all have ended well.
        is_repeated: Whether it came twice in a row at the same step.
    """

    again: bool
    cause: RestartCause | None
    is_repeated: bool = False


class CoordinatorClient:
    """Connects a launcher to the meeting point, again and again if need be.

    Args:
        address: Of the meeting point.
        rank: Of this machine.
        settings: What must be the same on all machines.
        restarts: Filled with those that the meeting point tells of.
        limit: Seconds to wait for the first machine, and there for all others.

    Attributes:
        active: The machines that have started together, after `meet`.
    """

    def __init__(
        self,
        address: tuple[str, int],
        rank: int,
        settings: dict[str, Any],
        restarts: Restarts,
        limit: float,
    ) -> None:
        self.restarts = restarts
        self._address, self._rank = address, rank
        self._settings, self._limit = settings, limit
        self._identity = secrets.token_hex(8)
        self._wire: Wire | None = None
        self._heard = 0.0
        self.active: Sequence[int] = ()
        self._refused: str | None = None
        self._news: News | None = None
        self._start = threading.Event()

    @property
    def news(self) -> News | None:
        """What all do now, if that was said; the loss of the first machine ends all too."""
        wire = self._wire
        if self._news is None and (
            wire is None or not wire.is_open or time.monotonic() - self._heard > SILENCE_S
        ):
            host, port = self._address
            self._hang_up()
            what = f"node 0 is lost: its launcher at {host}:{port} does not answer."
            cause = RestartCause(what, "while running", time.time(), START_ME_AGAIN)
            self._news = News(True, cause)
        return self._news

    def meet(self, received: Sequence[int], say: Callable[[str], None]) -> News | None:
        """Waits until the launchers of all machines are ready to start their workers.

        Args:
            received: The signals sent to the launcher; one ends the wait.
            say: Shows a line to the user.

        Returns:
            The end of the run, if there is nothing to start any more.

        Raises:
            LaunchError: This launcher is refused, or the first machine does not answer.
        """
        if self._news is not None and self._news.again:
            self._news = None
        self._start.clear()
        self._send("ready")
        began = reminded = time.monotonic()
        while not received:
            if self._wire is None:
                self._connect()
            now = time.monotonic()
            if self._refused is not None:
                raise LaunchError(self._refused)
            if self._start.is_set():
                return None
            if self._news is not None and not self._news.again:
                return self._news
            if self._wire is not None and (
                not self._wire.is_open or now - self._heard > SILENCE_S
            ):
                self._hang_up()
            if self._wire is None and now - began > self._limit:
                host, port = self._address
                raise LaunchError(
                    f"The launcher of node 0 must answer within {self._limit:g} s "
                    f"(--node-timeout). Received: no answer from {host}:{port}. Start it, and "
                    "check that this machine reaches that port."
                )
            if now - reminded > _REMIND_S:
                reminded = now
                whom = "node 0" if self._wire is None else "the other hosts"
                say(f"tfdist: waiting for the launcher of {whom} since {now - began:.0f} s.")
            self._start.wait(0.1)
        return None

    def failed(self, cause: RestartCause) -> None:
        """Says that a worker here has failed."""
        self._send("failed", cause=cause.to_json())

    def done(self) -> None:
        """Says that all workers here have ended well."""
        self._send("done")

    def leave(self, status: int) -> None:
        """Says that this launcher ends because somebody asked it to.

        Args:
            status: With which it ends.
        """
        self._send("bye", status=status)

    def close(self) -> None:
        """Ends the connection."""
        self._hang_up()

    def _send(self, kind: str, **fields: Any) -> None:
        if self._wire is not None:
            self._wire.send(kind, **fields)

    def _hang_up(self) -> None:
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.close()

    def _connect(self) -> None:
        try:
            connection = socket.create_connection(self._address, timeout=2.0)
        except OSError:
            time.sleep(_TRY_S)
            return
        self._wire, self._heard = Wire(connection), time.monotonic()
        for target in (self._listen, self._beat):
            threading.Thread(
                target=target, args=(self._wire,), name="tfdist-client", daemon=True
            ).start()

    def _beat(self, wire: Wire) -> None:
        while wire.is_open:
            wire.send("alive")
            time.sleep(BEAT_S)

    def _listen(self, wire: Wire) -> None:
        while wire.is_open:
            for message in wire.received():
                self._heard = time.monotonic()
                self._hear(wire, message)
        wire.close()

    def _hear(self, wire: Wire, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "welcome":
            known = [restart.cause.to_json() for restart in self.restarts.made]
            wire.send(
                "hello",
                rank=self._rank,
                identity=self._identity,
                proof=proof(message["nonce"]),
                settings=self._settings,
                restarts=known,
            )
            wire.send("ready")
        elif kind == "refused":
            self._refused = message["why"]
        elif kind == "start":
            self.active = message["active"]
            self._start.set()
        elif kind in ("again", "over"):
            told = message["cause"]
            cause = None if told is None else RestartCause.from_json(told)
            self._news = News(kind == "again", cause, message["repeated"])
