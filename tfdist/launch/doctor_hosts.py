"""`tfdist doctor --hosts`: asks other machines, and compares them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tfdist.launch import programs
from tfdist.launch.hosts import Host
from tfdist.launch.remote_hosts import is_here, ssh_command

# Workers with other versions of these do not understand each other, or compute other bits.
_SAME = ("python", "tfdist", "tensorflow", "keras", "horovod")


@dataclass(frozen=True)
class HostReport:
    """What a machine has answered.

    Attributes:
        host: Its name.
        report: `DoctorReport.to_json`, or None if there is no answer.
        error: Why there is none, and what to do.
    """

    host: str
    report: Mapping[str, Any] | None
    error: str = ""

    @property
    def version_of(self) -> Mapping[str, str]:
        """The versions of its packages."""
        versions: Mapping[str, str] = {} if self.report is None else self.report["versions"]
        return versions


def ask_hosts(
    hosts: Sequence[Host], own: Mapping[str, Any], limit: float = 180.0
) -> tuple[HostReport, ...]:
    """Runs `tfdist doctor --json` on each machine, over ssh, all at once.

    Args:
        hosts: The machines.
        own: The report of this one, which answers for its own names.
        limit: Seconds to wait for each of the others.
    """

    def ask(host: Host) -> HostReport:
        name = host.name.strip("[]")
        return HostReport(name, own) if is_here(host.name) else _asked(name, limit)

    with ThreadPoolExecutor(len(hosts)) as threads:
        return tuple(threads.map(ask, hosts))


def _asked(host: str, limit: float) -> HostReport:
    command = ssh_command(host, "tfdist.cli", "doctor", "--json")
    shown = f"ssh -o BatchMode=yes {host} {command[-1].removeprefix('exec ')}"
    try:
        done = programs.ask(command, limit)
    except subprocess.TimeoutExpired:
        return HostReport(host, None, _unanswered(f"nothing for {limit:.0f} s", shown))
    except OSError as error:
        return HostReport(host, None, _unanswered(f"{error.strerror}: ssh", shown))
    text = done.stdout
    try:
        report = json.loads(text[text.index("{") :])  # a shell may greet first
    except ValueError:
        reason = (done.stderr.strip() or "no output").splitlines()[-1]
        reason = f"{reason} (exit status {done.returncode})"
        return HostReport(host, None, _unanswered(reason, shown))
    return HostReport(host, report)


def _unanswered(reason: str, command: str) -> str:
    return f"It must answer over ssh. Received: {reason}. Try: {command}"


def problems(reports: Sequence[HostReport]) -> list[str]:
    """Lists why these machines cannot train together, each as a line with the remedy.

    Args:
        reports: Of all machines.
    """
    lines = []
    first = next((each for each in reports if each.report is not None), None)
    for each in reports:
        if each.report is None:
            lines.append(f"{each.host}: {each.error}")
            continue
        if error := each.report.get("tensorflow_error") or each.report.get("cluster_error"):
            lines.append(f"{each.host}: {error}")
        assert first is not None
        for name in _SAME:
            here, there = first.version_of.get(name), each.version_of.get(name)
            if here != there:
                lines.append(
                    f"{each.host} has {name} {there}, and {first.host} has {here}. Install the "
                    "same version on both."
                )
    return lines


def show(reports: Sequence[HostReport], console: Console | None = None) -> None:
    """Prints a table of the machines, and their problems.

    Args:
        reports: Of all machines.
        console: Where to print; standard output unless given.
    """
    console = console or Console(highlight=False)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("host", *_SAME, "cores", "GPUs"):
        table.add_column(name)
    for each in reports:
        report = each.report
        if report is None:
            table.add_row(each.host, Text("no answer", "red"))
            continue
        gpus = [device for device in report["devices"] if device["kind"] == "GPU"]
        # The first word: Keras names its backend too.
        cells = [str(each.version_of.get(name, "")).split(" (")[0] for name in _SAME]
        table.add_row(each.host, *cells, str(report["cores"]), str(len(gpus)))
    console.print(table)
    for line in problems(reports):
        console.print(Text.assemble(("Error: ", "bold red"), line), soft_wrap=True)
