"""The nodes of a run on Flower: which clients they are, and what they answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tfdist.errors import ArgumentError, PeerError
from tfdist.federated.flower import messages

ATTEMPTS = 3
_POLL_S = 1.0


@dataclass(frozen=True)
class Description:
    """What a client says of itself.

    Attributes:
        node: Flower's id of its node, which is another one when the node comes back.
        partition: The `partition-id` of its node's configuration, or None.
        rows: The rows that it holds.
        data: The structure of its data, or None if it holds no rows.
    """

    node: int
    partition: int | str | None
    rows: int
    data: Any


class Nodes:
    """The clients of a run, numbered by their partitions, or else by the ids of their nodes.

    Args:
        grid: Flower's `Grid`.
        wanted: Number of clients for which the run waits.
        timeout: Seconds to wait for clients, and for their answers.
        lost: "repeat": clients that do not answer are asked again. "skip": a round is made
            without them.
        say: Tells the user something.
    """

    def __init__(
        self, grid: Any, wanted: int, timeout: float, lost: str, say: Callable[[str], None]
    ) -> None:
        self._grid = grid
        self._wanted = wanted
        self._timeout = timeout
        self._skips = lost == "skip"
        self._say = say
        self._described: dict[int, Description] = {}
        self.clients: list[Description] = []

    def meet(self) -> list[Description]:
        """Waits for the clients, and asks each who it is.

        Returns:
            The clients in the order of their numbers.

        Raises:
            PeerError: There are too few, or one does not answer.
            ArgumentError: Two have the same partition, or none holds a row.
        """
        if len(self._online()) < self._wanted:
            self._say(f"waits for {self._wanted} clients")
        self._wait(lambda: len(self._online()) >= self._wanted, self._too_few)
        self._ask_who(self._online())
        found = list(self._described.values())
        partitions = [client.partition for client in found]
        if None in partitions:
            found.sort(key=lambda client: client.node)
        elif len(set(partitions)) < len(partitions):
            raise ArgumentError(
                "Each node must have a `partition-id` of its own, or none. Received: "
                f"partition-id={sorted(map(str, partitions))}. Change the --node-config of "
                "the nodes."
            )
        else:
            found.sort(key=lambda client: (isinstance(client.partition, str), client.partition))
        if not any(client.rows for client in found):
            raise ArgumentError(
                f"At least one client must hold an example. Received: no rows on any of "
                f"{len(found)} clients. Check `data_fn`."
            )
        self.clients = found
        return found

    def train(self, number: int, contents: Mapping[int, Any]) -> dict[int, Any]:
        """Sends a message to each client of a round, and collects the answers.

        Args:
            number: The number of the round.
            contents: The content of the message, by the number of the client.

        Returns:
            The contents of the answers, by the number of the client.

        Raises:
            PeerError: A client does not answer, and is needed.
        """
        answers: dict[int, Any] = {}
        for attempt in range(ATTEMPTS):
            missing = [client for client in contents if client not in answers]
            why = dict.fromkeys(missing, "its node is not connected")
            if not self._skips or attempt:
                self._wait_for(missing)
            away = self._offline(missing)
            present = {self.clients[c].node: c for c in missing if c not in away}
            why |= dict.fromkeys(present.values(), f"no answer in {self._timeout:g} s")
            sent = {node: contents[client] for node, client in present.items()}
            for reply in self._exchange("train", sent, str(number)):
                client = present[reply.metadata.src_node_id]
                if reply.has_error():
                    why[client] = str(reply.error.reason or reply.error.code)
                else:
                    answers[client] = reply.content
            missing = [client for client in missing if client not in answers]
            if not missing:
                return answers
            goes_on = self._skips and bool(answers)
            reasons = "; ".join(f"client {client}: {why[client]}" for client in missing)
            what = "is made without them" if goes_on else "is repeated for them"
            self._say(
                f"round {number + 1}: clients have not answered, the round {what}: {reasons}"
            )
            if goes_on:
                return answers
        raise PeerError(
            f"Each client of a round must answer. Received: nothing from client "
            f"{', '.join(map(str, missing))} in {ATTEMPTS} attempts ({reasons}). Mend or start "
            "it, and begin again; with `checkpoint` the rounds so far are kept. Or make rounds "
            "without lost clients: lost='skip'."
        )

    def _wait_for(self, clients: Iterable[int]) -> None:
        self._wait(lambda: not self._offline(clients), lambda: None)

    def _exchange(self, kind: str, contents: Mapping[int, Any], group: str) -> Iterable[Any]:
        make = messages.flower("app").Message
        sent = [
            make(content, node, kind, ttl=self._timeout, group_id=group)
            for node, content in contents.items()
        ]
        return list(self._grid.send_and_receive(sent, timeout=self._timeout)) if sent else []

    def _online(self) -> list[int]:
        return sorted(self._grid.get_node_ids())

    def _offline(self, clients: Iterable[int]) -> list[int]:
        """Returns those whose nodes are away, after a look at nodes that have come."""
        online = self._online()
        away = [client for client in clients if self.clients[client].node not in online]
        new = [node for node in online if node not in self._described]
        if not away or not new:
            return away
        self._ask_who(new)
        for client in away:
            known = self.clients[client]
            for node in new:
                back = self._described[node]
                if known.partition is not None and back.partition == known.partition:
                    self._take_back(client, back)
        return [client for client in away if self.clients[client].node not in online]

    def _take_back(self, client: int, back: Description) -> None:
        if back.rows != self.clients[client].rows:
            raise ArgumentError(
                "A client that comes back must hold the same rows. Received: "
                f"{back.rows} rows of client {client}, and {self.clients[client].rows} before."
            )
        self.clients[client] = back

    def _ask_who(self, nodes: Iterable[int]) -> None:
        types = messages.flower("app")
        asked = {node: types.RecordDict() for node in nodes}
        for reply in self._exchange("query", asked, ""):
            node = reply.metadata.src_node_id
            if reply.has_error():
                raise PeerError(
                    "Each client must say how many rows it holds. Received: an error of node "
                    f"{node}: {reply.error.reason}. Mend its `data_fn`, and begin again."
                )
            described = messages.of_plain(reply.content["description"])
            self._described[node] = Description(node, **described)
        silent = [node for node in asked if node not in self._described]
        if silent:
            raise PeerError(
                f"Each client must say how many rows it holds. Received: nothing from node "
                f"{silent[0]} in {self._timeout:g} s. Start it again, or raise `timeout`."
            )

    def _wait(self, ready: Callable[[], bool], give_up: Callable[[], None]) -> None:
        end = time.monotonic() + self._timeout
        while not ready():
            if time.monotonic() > end:
                give_up()
                return
            time.sleep(_POLL_S)

    def _too_few(self) -> None:
        raise PeerError(
            f"A run must have {self._wanted} clients. Received: {len(self._online())} "
            f"connected nodes after {self._timeout:g} s. Start the other nodes, or pass "
            "another `num_clients`."
        )
