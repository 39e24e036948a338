"""`tfdist doctor`: shows this machine, and which strategies can run on it."""

from __future__ import annotations

import json
import sys

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def doctor(as_json: bool) -> None:
    """Show versions, devices, the cluster, and which strategies can run here.

    \b
    Example:
      tfdist doctor

    Exit status: 0 if training in one process works and the cluster description is valid,
    else 1.
    """  # noqa: D301
    from tfdist.launch.doctor import examine

    report = examine()
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=2))
    else:
        # Few commands need the library that draws tables.
        from tfdist.launch.doctor_page import show

        show(report)
    sys.exit(0 if report.is_healthy else 1)
