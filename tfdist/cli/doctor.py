"""`tfdist doctor`: shows this machine, and which strategies can run on it."""

from __future__ import annotations

import sys

import click


@click.command()
def doctor() -> None:
    """Show versions, devices, the cluster, and which strategies can run here.

    \b
    Example:
      tfdist doctor

    Exit status: 0 if training in one process works and the cluster description is valid,
    else 1.
    """  # noqa: D301
    # Only this command needs the library that draws tables.
    from tfdist.launch.doctor import examine
    from tfdist.launch.doctor_page import show

    report = examine()
    show(report)
    sys.exit(0 if report.is_healthy else 1)
