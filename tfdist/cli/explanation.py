"""The last lines of `tfdist run`: why the run has ended."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import click

from tfdist.launch import Outcome, Worker, restart_lines, say_last

# TensorFlow quotes generated code in its tracebacks, with lines of thousands of characters.
_MAX_LINE_LENGTH = 240


def explain(
    outcome: Outcome,
    workers: tuple[Worker, ...],
    log_dir: Path | None,
    has_other_hosts: bool = False,
) -> None:
    """Prints why a run has ended, unless it has ended well, and its restarts.

    Args:
        outcome: How the run ended.
        workers: The workers of this machine.
        log_dir: The folder of the log files, or None.
        has_other_hosts: Whether the run has other hosts.
    """
    if outcome.interrupted == signal.SIGPIPE:
        # Standard output has no reader any more, and Python would print an error at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    failure, lines = outcome.failure, []
    if failure is None:
        if outcome.elsewhere is not None:
            repetition = (
                " It happened twice in a row at this step." if outcome.is_repeated else ""
            )
            lines.append(
                click.style("Error: ", fg="red", bold=True)
                + f"{outcome.elsewhere.what}{repetition} All workers have been ended."
            )
        lines += restart_lines(outcome.restarts)
        if lines:
            say_last("\n".join(lines))
        return
    lines = [click.style("Error: ", fg="red", bold=True) + failure.describe()]
    excerpt = failure.excerpt()
    if excerpt:
        lines[0] += " Its last lines:"
        bar = click.style("│", fg="red")
        lines += ["", *(f"  {bar} {line[:_MAX_LINE_LENGTH]}" for line in excerpt), ""]
    else:
        lines[0] += " It had written nothing."
    if failure.blames_peer and outcome.finished:
        lines.append(
            f"{' and '.join(outcome.finished)} had ended before, with exit status 0: "
            "all workers must make the same steps."
        )
    elif failure.blames_peer and has_other_hosts:
        lines.append("It lost another worker: the cause may be in the output of another host.")
    if outcome.is_repeated:
        where = failure.progress.where
        lines.append(f"It came twice in a row {where}: it is not started again.")
    if log_dir is not None:
        lines.append(f"Its whole output: {log_dir / failure.worker.log_name}")
    if len(workers) > 1:
        lines.append("All workers on this machine have been ended.")
    lines += restart_lines(outcome.restarts)
    say_last("\n".join(lines))
