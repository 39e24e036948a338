"""`tfdist doctor`: shows this machine, and which strategies can run on it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import click

from tfdist.launch import Host, parse_hosts


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option(
    "--hosts", metavar="HOSTS", help="Ask these machines over ssh, and compare them: a,b,c."
)
def doctor(as_json: bool, hosts: str | None) -> None:
    """Show versions, devices, the cluster, and which strategies can run here.

    \b
    Examples:
      tfdist doctor
      tfdist doctor --hosts node1,node2    versions and devices of both, over ssh

    Exit status: 0 if training in one process works and the cluster description is valid,
    and with --hosts if all machines answer and have the same versions; else 1.
    """  # noqa: D301
    from tfdist.launch.doctor import examine

    machines = () if hosts is None else parse_hosts(hosts)
    report = examine()
    if machines:
        sys.exit(_compare(machines, report.to_json(), as_json))
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=2))
    else:
        # Few commands need the library that draws tables.
        from tfdist.launch.doctor_page import show

        show(report)
    sys.exit(0 if report.is_healthy else 1)


def _compare(machines: Sequence[Host], own: Mapping[str, Any], as_json: bool) -> int:
    """Asks machines, and returns the exit status."""
    from tfdist.launch.doctor_hosts import ask_hosts, problems, show

    reports = ask_hosts(machines, own)
    problem_lines = problems(reports)
    if as_json:
        answers = {each.host: each.report or {"error": each.error} for each in reports}
        click.echo(json.dumps({"hosts": answers, "problems": problem_lines}, indent=2))
    else:
        show(reports)
    return 1 if problem_lines else 0
