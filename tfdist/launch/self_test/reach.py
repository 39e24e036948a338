"""Tries every connection between the launchers of a run, before TensorFlow is started."""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import dataclass

from tfdist.cluster import WORKER, Cluster
from tfdist.cluster.greetings import Greeting, Greetings
from tfdist.cluster.rendezvous import START_TIMEOUT, difference, try_to_connect
from tfdist.errors import LaunchError
from tfdist.launch.self_test.peers import Peers

_NOTICE_S = 10.0
# Once each launcher has been heard of, a port that still does not answer is blocked.
_LATE_S = 15.0
_POLL_S = 0.1


@dataclass(frozen=True)
class Blockage:
    """A connection that two hosts could not make.

    Attributes:
        source: The host that calls.
        target: The host that is called.
        port: The port that is called.
        task: The process that will listen there.
        reason: Why the call failed; empty if the other host has made it.
        was_heard: Whether something else has come from the other host.
    """

    source: str
    target: str
    port: int
    task: str
    reason: str
    was_heard: bool

    def describe(self) -> str:
        """Returns what does not work and what to do, in sentences."""
        what = f"{self.source} does not reach {self.task} at {self.target}:{self.port}"
        if not self.reason:
            return (
                f"{what}, though {self.target} reaches {self.source}. Let TCP connections "
                f"from {self.source} to port {self.port} of {self.target} through the firewall."
            )
        if self.reason == "its name does not resolve":
            remedy = f"Correct the name {self.target}, or give the IP address."
        elif self.was_heard:
            remedy = (
                f"The host is there: let TCP connections from {self.source} to port "
                f"{self.port} of {self.target} through the firewall."
            )
        elif "refused" in self.reason:
            remedy = (
                f"Nothing listens there: start the same command on {self.target}, and see what "
                "it prints."
            )
        else:
            remedy = (
                f"Start the same command on {self.target}. If it runs there, a firewall or the "
                f"network drops TCP connections from {self.source} to port {self.port}."
            )
        return f"{what} ({self.reason}). {remedy}"


def blockages(peers: Peers, seconds: float, versions: str) -> list[Blockage]:
    """Calls every process of the other launchers, and waits until each of these has called.

    Args:
        peers: The processes; this launcher listens at the addresses of its own.
        seconds: How long the other launchers may take to start.
        versions: The versions of packages that must be the same everywhere, as one text.

    Returns:
        The connections that could not be made; empty if all hosts reach each other.

    Raises:
        LaunchError: Another launcher has other addresses, the same place or other versions.
        StrategyError: A port of this machine is in use.
    """
    return _Meeting(peers, versions).run(seconds)


class _Meeting:
    def __init__(self, peers: Peers, versions: str) -> None:
        self._peers = peers
        addresses = tuple(task.address for task in peers.tasks)
        self._cluster = Cluster({WORKER: addresses}, WORKER, peers.here[0], "--hosts")
        self._greeting = Greeting(peers.here[0], addresses, versions)
        others = [i for i in range(len(peers.launchers)) if i != peers.local]
        # By position: calls that must succeed, and for each own port the launchers to come.
        self._unreached = {
            task: "no answer yet" for other in others for task in peers.launchers[other]
        }
        self._uncalled = {task: set(others) for task in peers.here}
        self._heard: set[int] = set()

    def run(self, seconds: float) -> list[Blockage]:
        began = time.monotonic()
        deadline, was_told = began + seconds, False
        with contextlib.ExitStack() as stack:
            listeners = {
                task: stack.enter_context(
                    Greetings(self._cluster, self._peers.tasks[task].address)
                )
                for task in self._peers.here
            }
            while missing := self._missing():
                self._call(deadline)
                for task, listener in listeners.items():
                    for greeting in listener.received():
                        self._take(task, greeting)
                now = time.monotonic()
                if len(self._heard) == len(self._peers.launchers) - 1:
                    deadline = min(deadline, now + _LATE_S)
                if now > deadline:
                    return missing
                if now - began > _NOTICE_S and not was_told:
                    was_told = True
                    self._tell(missing, seconds)
        return []

    def _call(self, deadline: float) -> None:
        for task in tuple(self._unreached):
            reason = try_to_connect(self._peers.tasks[task].address, self._greeting.line())
            if reason is None:
                del self._unreached[task]
                self._heard.add(self._peers.launcher_of(task))
            else:
                self._unreached[task] = reason
            if time.monotonic() > deadline:
                return

    def _take(self, task: int, greeting: Greeting) -> None:
        problem = difference(greeting, self._greeting, self._cluster)
        if problem:
            raise LaunchError(problem)
        if greeting.worker < len(self._peers.tasks):
            launcher = self._peers.launcher_of(greeting.worker)
            self._uncalled[task].discard(launcher)
            self._heard.add(launcher)

    def _missing(self) -> list[Blockage]:
        tasks, own = self._peers.tasks, self._peers.tasks[self._peers.here[0]].host
        outward = [
            Blockage(
                own,
                tasks[task].host,
                tasks[task].port,
                tasks[task].name,
                reason,
                self._peers.launcher_of(task) in self._heard,
            )
            for task, reason in self._unreached.items()
        ]
        inward = [
            Blockage(
                tasks[self._peers.launchers[launcher][0]].host,
                own,
                tasks[task].port,
                tasks[task].name,
                "",
                True,
            )
            for task, launchers in self._uncalled.items()
            for launcher in sorted(launchers & self._heard)
        ]
        return outward + inward

    def _tell(self, missing: list[Blockage], seconds: float) -> None:
        listed = ", ".join(
            f"{b.task} at {b.target}:{b.port} ({b.reason or 'it was not called'})"
            for b in missing
        )
        print(
            f"tfdist: this host waits for {listed}, at most {seconds:g} s in all "
            f"({START_TIMEOUT}).",
            file=sys.stderr,
            flush=True,
        )
