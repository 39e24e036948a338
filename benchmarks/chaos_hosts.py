"""Machines for the trainings of `benchmarks.chaos`: network namespaces, and a small disk.

Without the rights to make them, a training runs in the machine's own namespace and on its own
disk: then nothing can be said of open ports, and networks and disks do not fail.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

ADDRESSES = ("10.77.0.1", "10.77.0.2")
DISK_BYTES = 6 << 20
_BLOCKING, _FORWARDING = "0", "3"


def _do(*command: str) -> bool:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode == 0


class Hosts:
    """One or two hosts: network namespaces that a bridge connects.

    Args:
        count: 1 or 2.
        name: Of the namespaces; unique on this machine.

    Attributes:
        are_real: Whether there are namespaces.
    """

    def __init__(self, count: int, name: str) -> None:
        self._names = [f"{name}{end}" for end in "ab"[:count]]
        self._bridge = f"{name}r" if count > 1 else ""
        self.are_real = all(_do("ip", "netns", "add", n) for n in self._all)
        if self.are_real:
            for one in self._all:
                _do("ip", "-n", one, "link", "set", "lo", "up")
            if self._bridge:
                self._connect()

    @property
    def _all(self) -> list[str]:
        return [*self._names, self._bridge] if self._bridge else self._names

    def _connect(self) -> None:
        bridge = self._bridge
        _do("ip", "-n", bridge, "link", "add", "bridge", "type", "bridge")
        _do("ip", "-n", bridge, "link", "set", "bridge", "up")
        for name, port, address in zip(self._names, ("ra", "rb"), ADDRESSES, strict=True):
            pair = f"ip link add e0 netns {name} type veth peer name {port} netns {bridge}"
            _do(*pair.split())
            _do("ip", "-n", bridge, "link", "set", port, "master", "bridge", "up")
            _do("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "e0")
            _do("ip", "-n", name, "link", "set", "e0", "up")

    def command(self, host: int, command: Sequence[str]) -> list[str]:
        """Returns a command that runs on a host.

        Args:
            host: Its number.
            command: The command.
        """
        if not self.are_real:
            return list(command)
        return ["ip", "netns", "exec", self._names[host], *command]

    def cut(self) -> bool:
        """Loses all packets between the hosts, without a word to either."""
        return self._ports(_BLOCKING)

    def mend(self) -> bool:
        """Ends `cut`."""
        return self._ports(_FORWARDING)

    def _ports(self, state: str) -> bool:
        return bool(self._bridge) and all(
            _do("bridge", "-n", self._bridge, "link", "set", "dev", port, "state", state)
            for port in ("ra", "rb")
        )

    def open_ports(self) -> list[str]:
        """Lists the addresses at which something listens."""
        found = []
        for name in self._names if self.are_real else ():
            listed = subprocess.run(
                ["ip", "netns", "exec", name, "ss", "-ltnH"],
                capture_output=True,
                text=True,
                check=False,
            )
            found += [line.split()[3] for line in listed.stdout.splitlines() if line.strip()]
        return found

    def close(self) -> None:
        """Removes the namespaces."""
        for name in self._all if self.are_real else ():
            _do("ip", "netns", "del", name)


class Disk:
    """A small disk of its own, that can be filled.

    Args:
        folder: Where it is mounted.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        size = f"size={DISK_BYTES}"
        self.is_real = _do("mount", "-t", "tmpfs", "-o", size, "tmpfs", os.fspath(folder))

    def fill(self) -> None:
        """Takes all room that is left."""
        try:
            with (self.folder / "junk").open("wb", buffering=0) as file:
                while True:
                    file.write(b"x" * 4096)
        except OSError:
            pass

    def empty(self) -> None:
        """Gives the room back."""
        (self.folder / "junk").unlink(missing_ok=True)

    def close(self) -> None:
        """Unmounts it."""
        if self.is_real:
            _do("umount", "-l", os.fspath(self.folder))
