"""Prints the report of `tfdist doctor`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tfdist.cluster import Cluster
from tfdist.launch.doctor import DoctorReport


def show(report: DoctorReport, console: Console | None = None) -> None:
    """Prints a report as tables.

    Args:
        report: The report of `examine`.
        console: Where to print; standard output unless given.
    """
    console = console or Console(highlight=False)
    console.print(_versions(report))
    console.print()
    console.print(_machine(report))
    console.print()
    console.print(_strategies(report))
    for problem in (report.tensorflow_error, report.cluster_error):
        if problem:
            console.print()
            console.print(Text.assemble(("Error: ", "bold red"), problem))


def _table(title: str) -> Table:
    return Table(
        title=title, title_justify="left", title_style="bold", box=None, pad_edge=False,
        show_header=False, padding=(0, 2, 0, 0),
    )  # fmt: skip


def _versions(report: DoctorReport) -> Table:
    table = _table("Versions")
    for name, version in report.versions.items():
        table.add_row(f"  {name}", Text(version, "" if version[0].isdigit() else "dim"))
    return table


def _machine(report: DoctorReport) -> Table:
    table = _table("This machine")
    table.add_row("  cores", str(report.cores))
    for device in report.devices:
        table.add_row(f"  {device.kind}", Text(f"{device.name}  {device.model}".rstrip()))
    if not report.devices:
        table.add_row("  devices", Text("unknown", "dim"))
    table.add_row("  cluster", _cluster(report.cluster))
    return table


def _cluster(cluster: Cluster | None) -> Text:
    if cluster is None:
        return Text("malformed, see below", "red")
    if cluster.launched:
        return Text(f"rank {cluster.index} of {cluster.launched}, from {cluster.source}")
    if not cluster.jobs:
        return Text("none: a single process (no TF_CONFIG, not a task of a SLURM step)")
    lines = [f"this is {cluster.task}, from {cluster.source}"]
    for job, addresses in cluster.jobs.items():
        lines += [f"{job} {index}: {address}" for index, address in enumerate(addresses)]
    return Text("\n".join(lines))


def _strategies(report: DoctorReport) -> Table:
    table = _table("Strategies")
    for ready in report.strategies:
        verdict = Text("✔ yes", "green") if ready.can_run else Text("✘ no", "red")
        table.add_row(f"  {ready.strategy}", verdict, Text(ready.reason))
    return table
