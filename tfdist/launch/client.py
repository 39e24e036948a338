"""The connection of a launcher to the coordinator of all launchers."""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tfdist.errors import START_ME_AGAIN, LaunchError
from tfdist.launch.protocol import BEAT_S, SILENCE_S, Connection, proof
from tfdist.launch.restarts import RestartCause, Restarts

_TRY_S = 0.5
_REMIND_S = 30.0


@dataclass(frozen=True)
class Decision:
    """The coordinator's decision, which all launchers follow.

    Attributes:
        again: Whether all workers are started again; otherwise the run is over.
        cause: The cause; None if all workers ended well.
        is_repeated: Whether the cause came twice in a row at the same step.
    """

    again: bool
    cause: RestartCause | None
    is_repeated: bool = False


class CoordinatorClient:
    """Connects a launcher to the coordinator, and connects again when the connection is lost.

    Args:
        address: The coordinator's host and port.
        rank: The rank of this machine.
        settings: Settings that must be the same on all machines.
        restarts: The list of restarts; the coordinator's decisions are added to it.
        limit: Seconds to wait for the first machine, and then for all other machines.

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
        self._connection: Connection | None = None
        self._last_message_at = 0.0
        self.active: Sequence[int] = ()
        self._refusal: str | None = None
        self._decision: Decision | None = None
        self._start = threading.Event()

    @property
    def decision(self) -> Decision | None:
        """The coordinator's decision, or None; losing the coordinator is a decision too."""
        connection = self._connection
        if self._decision is None and (
            connection is None
            or not connection.is_open
            or time.monotonic() - self._last_message_at > SILENCE_S
        ):
            host, port = self._address
            self._disconnect()
            text = f"node 0 is lost: its launcher at {host}:{port} does not answer."
            cause = RestartCause(text, "while running", time.time(), START_ME_AGAIN)
            self._decision = Decision(True, cause)
        return self._decision

    def meet(self, received: Sequence[int], say: Callable[[str], None]) -> Decision | None:
        """Waits until the launchers of all machines are ready to start their workers.

        Args:
            received: The signals sent to the launcher; a signal ends the wait.
            say: Shows a line to the user.

        Returns:
            The decision that ends the run, or None if the workers are to start.

        Raises:
            LaunchError: This launcher is refused, or the first machine does not answer.
        """
        if self._decision is not None and self._decision.again:
            self._decision = None
        self._start.clear()
        self._send("ready")
        began = reminded = time.monotonic()
        while not received:
            if self._connection is None:
                self._connect()
            now = time.monotonic()
            if self._refusal is not None:
                raise LaunchError(self._refusal)
            if self._start.is_set():
                return None
            if self._decision is not None and not self._decision.again:
                return self._decision
            if self._connection is not None and (
                not self._connection.is_open or now - self._last_message_at > SILENCE_S
            ):
                self._disconnect()
            if self._connection is None and now - began > self._limit:
                host, port = self._address
                raise LaunchError(
                    f"The launcher of node 0 must answer within {self._limit:g} s "
                    f"(--node-timeout). Received: no answer from {host}:{port}. Start it, and "
                    "check that this machine reaches that port."
                )
            if now - reminded > _REMIND_S:
                reminded = now
                whom = "node 0" if self._connection is None else "the other hosts"
                say(f"tfdist: waiting for the launcher of {whom} since {now - began:.0f} s.")
            self._start.wait(0.1)
        return None

    def report_failure(self, cause: RestartCause) -> None:
        """Reports that a worker here has failed."""
        self._send("failed", cause=cause.to_json())

    def report_done(self) -> None:
        """Reports that all workers here have ended well."""
        self._send("done")

    def leave(self, status: int) -> None:
        """Reports that this launcher ends because of a signal.

        Args:
            status: The exit status of the launcher.
        """
        self._send("bye", status=status)

    def close(self) -> None:
        """Ends the connection."""
        self._disconnect()

    def _send(self, kind: str, **fields: Any) -> None:
        if self._connection is not None:
            self._connection.send(kind, **fields)

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _connect(self) -> None:
        try:
            tcp_socket = socket.create_connection(self._address, timeout=2.0)
        except OSError:
            time.sleep(_TRY_S)
            return
        self._connection, self._last_message_at = Connection(tcp_socket), time.monotonic()
        for target in (self._listen, self._beat):
            threading.Thread(
                target=target, args=(self._connection,), name="tfdist-client", daemon=True
            ).start()

    def _beat(self, connection: Connection) -> None:
        while connection.is_open:
            connection.send("alive")
            time.sleep(BEAT_S)

    def _listen(self, connection: Connection) -> None:
        while connection.is_open:
            for message in connection.received():
                self._last_message_at = time.monotonic()
                self._handle(connection, message)
        connection.close()

    def _handle(self, connection: Connection, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "welcome":
            earlier_causes = [restart.cause.to_json() for restart in self.restarts.history]
            connection.send(
                "hello",
                rank=self._rank,
                identity=self._identity,
                proof=proof(message["nonce"]),
                settings=self._settings,
                restarts=earlier_causes,
            )
            connection.send("ready")
        elif kind == "refused":
            self._refusal = message["why"]
        elif kind == "start":
            self.active = message["active"]
            self._start.set()
        elif kind in ("again", "over"):
            cause_fields = message["cause"]
            cause = None if cause_fields is None else RestartCause.from_json(cause_fields)
            self._decision = Decision(kind == "again", cause, message["repeated"])
