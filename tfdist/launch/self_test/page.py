"""Prints the report of `tfdist test`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tfdist.launch.self_test.report import SelfTestReport
from tfdist.launch.self_test.result import Result

_STYLES = {"problem": "bold red", "warning": "yellow", "note": ""}


def show(report: SelfTestReport, console: Console | None = None) -> None:
    """Prints a report, and in the last line whether training works.

    Args:
        report: The report.
        console: Where to print; standard output unless given.
    """
    # Sentences are not broken: a terminal does it, and a file or a pipe has no width.
    console = console or Console(highlight=False, soft_wrap=True)
    result = report.result
    if result is not None:
        console.print(_trainings(result))
        console.print()
        if result.speeds:
            console.print(_speeds(result))
            console.print()
    if report.links:
        console.print(_links(report))
        console.print()
    if result is not None and result.timings:
        console.print(_timings(report, result))
        console.print()
    others = [verdict for verdict in report.verdicts if verdict.kind != "problem"]
    for verdict in others:
        console.print(Text.assemble(f"{verdict.kind}: ", (verdict.text, _STYLES[verdict.kind])))
    for problem in report.problems:
        console.print(Text.assemble(("problem: ", _STYLES["problem"]), problem))
    verdict_of_all = "works" if report.works else "does not work"
    console.print(
        Text.assemble(
            "tfdist test: ",
            (verdict_of_all, "bold green" if report.works else "bold red"),
            _where(report),
        )
    )


def _where(report: SelfTestReport) -> str:
    result = report.result
    if result is None:
        return "."
    workers = f"{result.workers} worker{'' if result.workers == 1 else 's'}"
    hosts = len(report.hosts)
    where = f" on {hosts} hosts" if hosts > 1 else ""
    return f" ({result.strategy}, {workers}{where})."


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, pad_edge=False,
        header_style="dim", padding=(0, 2, 0, 0),
    )  # fmt: skip
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    return table


def _trainings(result: Result) -> Table:
    table = _table(
        f"Small trainings, {result.strategy} ({result.description}) beside one process",
        "  training", "difference", "allowed", "workers", "verdict",
    )  # fmt: skip
    for compared in result.trainings:
        ok = Text("✔ equal", "green") if compared.is_equal else Text("✘ differs", "red")
        among = "differ" if compared.differs else "same bits"
        table.add_row(
            f"  {compared.training}",
            f"{compared.distance:.1e}",
            f"{compared.tolerance:g}",
            among if result.workers > 1 else "",
            ok,
        )
    return table


def _speeds(result: Result) -> Table:
    table = _table("Computing, all workers at once", "  worker", "device", "GFLOP/s", "host")
    for speed in result.speeds:
        table.add_row(f"  {speed.worker}", speed.device, f"{speed.flops / 1e9:.3g}", speed.host)
    return table


def _links(report: SelfTestReport) -> Table:
    table = _table(
        f"Links from {report.links[0].source}, over TCP",
        "  host", "round trip", "to it", "from it",
    )  # fmt: skip
    for link in report.links:
        table.add_row(
            f"  {link.target}",
            f"{1000 * link.latency_s:.3g} ms",
            f"{8e-6 * link.to_bytes_per_s:.3g} Mbit/s",
            f"{8e-6 * link.from_bytes_per_s:.3g} Mbit/s",
        )
    return table


def _timings(report: SelfTestReport, result: Result) -> Table:
    operations = list(dict.fromkeys(timing.operation for timing in result.timings))
    table = _table("Collectives, by the bytes of each replica's tensor", "  size", *operations)
    times = {(t.operation, t.size): t.seconds for t in result.timings}
    for size in sorted({timing.size for timing in result.timings}):
        row = [times.get((operation, size)) for operation in operations]
        table.add_row(
            f"  {_size(size)}",
            *("-" if seconds is None else f"{1000 * seconds:.3g} ms" for seconds in row),
        )
    lines = dict(report.lines)
    table.add_row(
        "  fitted",
        *(
            f"{1000 * lines[o].latency_s:.2g} ms + n / {lines[o].bytes_per_s / 1e6:.3g} MB/s"
            if o in lines
            else "-"
            for o in operations
        ),
    )
    return table


def _size(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"
