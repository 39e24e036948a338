"""The connection of a launcher to the coordinator of all launchers."""

from __future__ import annotations

import hmac
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tfdist.errors import START_ME_AGAIN, LaunchError
from tfdist.launch.messages import PROTOCOL, TO_LAUNCHER, Message
from tfdist.launch.protocol import BEAT_S, SILENCE_S, Connection, Handshake
from tfdist.launch.restarts import RestartCause, Restarts
from tfdist.launch.token import DEFAULT_FILE, TOKEN

_TRY_S = 0.5
_REMIND_S = 30.0
_OTHER_TOKEN = (
    "The token of all launchers must be the same. Received: another one at node 0 than here. "
    f"Copy the file {DEFAULT_FILE} of node 0 to this host, or set {TOKEN} to the same secret "
    "on all hosts."
)
_OTHER_VERSION = (
    "All hosts must have the same version of tfdist. Received: another one at node 0 than "
    "here. Install the same."
)


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
        token: The token of the run.
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
        token: str,
        rank: int,
        settings: dict[str, Any],
        restarts: Restarts,
        limit: float,
    ) -> None:
        self.restarts = restarts
        self._address, self._rank = address, rank
        self._token = token.encode()
        self._handshake: Handshake | None = None
        self._was_admitted = False
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
            text = f"node 0 is lost: its launcher at {_shown(host)}:{port} does not answer."
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
            LaunchError: This launcher is refused, or the first machine never answers.
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
                self._start.wait(_TRY_S)
            is_admitted = self._connection is not None and self._connection.is_admitted
            if not is_admitted and now - began > self._limit:
                host, port = self._address
                if self._was_admitted:
                    return self._end_without_coordinator()
                raise LaunchError(
                    f"The launcher of node 0 must answer within {self._limit:g} s "
                    f"(--node-timeout). Received: no answer from {_shown(host)}:{port}. Start "
                    "it, and check that this machine reaches that port."
                )
            if now - reminded > _REMIND_S:
                reminded = now
                whom = "the other hosts" if is_admitted else "node 0"
                say(f"tfdist: waiting for the launcher of {whom} since {now - began:.0f} s.")
            self._start.wait(0.1)
        return None

    def _end_without_coordinator(self) -> Decision:
        text = f"node 0 has not come back within {self._limit:g} s (--node-timeout)."
        where = "while waiting for all hosts"
        return Decision(False, RestartCause(text, where, time.time(), START_ME_AGAIN))

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
        connection = self._connection
        if connection is not None and connection.is_admitted:
            connection.send(kind, **fields)

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
            if connection.is_admitted:
                connection.send("alive")
            time.sleep(BEAT_S)

    def _listen(self, connection: Connection) -> None:
        while connection.is_open:
            connection.wait(BEAT_S)
            for message in connection.received():
                if connection.is_admitted:
                    self._last_message_at = time.monotonic()
                    self._handle(message)
                else:
                    self._prove(connection, message)
        connection.close()

    def _prove(self, connection: Connection, message: Message) -> None:
        """Proves that this launcher knows the token, and lets the coordinator prove it too."""
        kind = message["kind"]
        if kind == "welcome" and message["protocol"] == PROTOCOL:
            nonce = secrets.token_hex(16)
            self._handshake = Handshake(self._token, message["nonce"], nonce)
            proof = self._handshake.launcher_proof
            connection.send("hello", protocol=PROTOCOL, nonce=nonce, proof=proof)
            return
        handshake = self._handshake
        if (
            kind == "admitted"
            and handshake is not None
            and hmac.compare_digest(message["proof"], handshake.coordinator_proof)
        ):
            connection.secure(handshake.launcher_key, handshake.coordinator_key, TO_LAUNCHER)
            self._was_admitted = True
            self._join(connection)
            return
        if not self._was_admitted:  # otherwise the right coordinator may come back
            is_of_version = message.get("protocol", PROTOCOL) == PROTOCOL
            self._refusal = _OTHER_TOKEN if is_of_version else _OTHER_VERSION
        connection.is_open = False

    def _join(self, connection: Connection) -> None:
        earlier_causes = [restart.cause.to_json() for restart in self.restarts.history]
        connection.send(
            "join",
            rank=self._rank,
            identity=self._identity,
            settings=self._settings,
            restarts=earlier_causes,
        )
        connection.send("ready")

    def _handle(self, message: Message) -> None:
        kind = message["kind"]
        if kind == "refused":
            self._refusal = message["why"]
        elif kind == "start":
            self.active = message["active"]
            self._start.set()
        elif kind in ("again", "over"):
            cause_fields = message["cause"]
            cause = None if cause_fields is None else RestartCause.from_json(cause_fields)
            self._decision = Decision(kind == "again", cause, message["repeated"])


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
