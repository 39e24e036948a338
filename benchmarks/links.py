"""Two network namespaces joined by a link whose rate can be limited; needs root."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

DEVICE = "eth0"
VARIABLE = "TFDIST_BENCHMARK_DEVICE"  # says what to count on


class Link:
    """Two machines, as far as the network goes, each with an address of its own.

    Attributes:
        addresses: Of the two.
    """

    addresses = ("10.78.0.1", "10.78.0.2")

    def __init__(self) -> None:
        self._names = [f"tfdl{os.getpid() % 100000}-{i}" for i in range(2)]

    def make(self) -> None:
        """Joins them by a cable."""
        for name in self._names:
            _call("ip", "netns", "add", name)
        first, second = self._names
        ends = ["netns", first, "type", "veth", "peer", "name", DEVICE, "netns", second]
        _call("ip", "link", "add", DEVICE, *ends)
        for name, address in zip(self._names, self.addresses, strict=True):
            _call("ip", "-n", name, "addr", "add", f"{address}/24", "dev", DEVICE)
            for device in (DEVICE, "lo"):
                _call("ip", "-n", name, "link", "set", device, "up")

    def limit(self, mbit: int | None) -> None:
        """Sets the rate in both directions.

        Args:
            mbit: Megabits a second; None for none.
        """
        for name in self._names:
            before = ["tc", "-n", name, "qdisc"]
            subprocess.run(
                [*before, "del", "dev", DEVICE, "root"], check=False, capture_output=True
            )
            if mbit is not None:
                rate = [
                    "rate",
                    f"{mbit}mbit",
                    "burst",
                    f"{max(32, mbit)}kb",
                    "latency",
                    "100ms",
                ]
                _call(*before, "add", "dev", DEVICE, "root", "tbf", *rate)

    def within(self, machine: int) -> list[str]:
        """Gives what goes before a command that runs on a machine.

        Args:
            machine: 0 or 1.
        """
        return ["ip", "netns", "exec", self._names[machine]]

    def remove(self) -> None:
        """Takes the machines away."""
        for name in self._names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def obstacle() -> str | None:
    """Says why there can be no link here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if missing:
        return f"network namespaces need {' and '.join(missing)} (package iproute2)"
    link = Link()
    try:
        link.make()
        link.limit(100)
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {error.stderr.decode().strip()}"
    finally:
        link.remove()
    return None


@contextlib.contextmanager
def linked() -> Iterator[Link]:
    """Makes a link, and takes it away."""
    link = Link()
    try:
        link.make()
        yield link
    finally:
        link.remove()


def bytes_sent() -> int:
    """Counts what this process's network namespace has sent: by its cable, if not else told."""
    sent = {}
    for line in Path("/proc/net/dev").read_text().splitlines()[2:]:
        name, _, numbers = line.partition(":")
        sent[name.strip()] = int(numbers.split()[8])
    return sent.get(os.environ.get(VARIABLE, DEVICE), 0)


def _call(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=20)
