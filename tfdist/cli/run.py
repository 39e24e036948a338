"""`tfdist run`: starts the worker processes of a script, and says why they failed."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import click

from tfdist.cluster import strategy_names
from tfdist.launch import (
    DEFAULT_PORT,
    NODE_TIMEOUT_S,
    SAVING_S,
    CoordinatorClient,
    Outcome,
    Restarts,
    Roster,
    Worker,
    check_names,
    joined,
    listed,
    parse_elastic,
    parse_hosts,
    run_workers,
    script_command,
)

# Generated code, which TensorFlow quotes in its tracebacks, has lines of thousands.
_WIDEST = 240


@click.command(context_settings={"allow_interspersed_args": False})
@click.option("-n", "--workers", type=int, help="Workers in all.  [default: 1]")
@click.option(
    "--ps",
    "servers",
    type=int,
    default=0,
    metavar="N",
    help="Parameter servers in all; the script then runs on a chief beside the workers.",
)
@click.option(
    "--synchronous",
    is_flag=True,
    help="With --ps: the workers share each batch, as in all other strategies.",
)
@click.option("--hosts", metavar="H:N,...", help="The machines, and how many workers on each.")
@click.option("--node-rank", type=int, metavar="I", help="Which of --hosts this machine is.")
@click.option(
    "--port",
    type=int,
    default=DEFAULT_PORT,
    show_default=True,
    help="With --hosts: the port of worker 0; worker k has this one + k.",
)
@click.option(
    "--strategy",
    type=click.Choice(["auto", *strategy_names.names()]),
    help="How to distribute; else what the script asks for, or auto.",
)
@click.option("--drop-in", is_flag=True, help="Distribute a script's own Model.fit.")
@click.option(
    "--output",
    type=click.Choice(("chief", "all")),
    default="chief",
    show_default=True,
    help="Whose output is shown. With chief: on other hosts their first worker's; others' "
    "is kept, and shown if they fail.",
)
@click.option(
    "--log-dir",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Also write each worker's output to DIR/worker-<i>.log.",
)
@click.option(
    "--max-restarts",
    type=click.IntRange(min=0),
    metavar="N",
    help="Restarts after failures, at most.  [default: 0, with --ps or --elastic 3]",
)
@click.option(
    "--elastic",
    metavar="MIN:MAX",
    help="Start MAX workers; go on with MIN at least, without what is lost.",
)
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    default=SAVING_S,
    show_default=True,
    metavar="SECONDS",
    help="After SIGTERM: how long workers with a checkpoint may take to save.",
)
@click.option(
    "--node-timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=NODE_TIMEOUT_S,
    show_default=True,
    metavar="SECONDS",
    help="With --hosts and --max-restarts: how long a host may take to come (back).",
)
@click.option("-m", "--module", is_flag=True, help="SCRIPT is a module, as after python -m.")
@click.argument("script")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[ARGUMENTS]...")
def run(
    workers: int | None,
    servers: int,
    synchronous: bool,
    hosts: str | None,
    node_rank: int | None,
    port: int,
    strategy: str | None,
    drop_in: bool,
    output: str,
    log_dir: Path | None,
    max_restarts: int | None,
    elastic: str | None,
    grace: float,
    node_timeout: float,
    module: bool,
    script: str,
    arguments: tuple[str, ...],
) -> None:
    """Run SCRIPT in one or more worker processes.

    Everything after SCRIPT belongs to the script. Cores and GPUs are shared out between the
    workers of a machine. The first failure ends all workers. With --max-restarts they are
    then started again, unless the same failure comes twice in a row at the same step; with
    `fit(..., checkpoint=...)` in the script, training goes on from its last checkpoint, and
    SIGTERM saves and ends with status 75.

    \b
    Examples:
      tfdist run -n 2 train.py --epochs 5
      tfdist run -n 2 --ps 1 train.py      with a parameter server
      tfdist run -n 2 --max-restarts 5 train.py
      tfdist run --hosts node1:4,node2:4 --node-rank 0 train.py    on node1
      tfdist run --hosts node1:4,node2:4 --node-rank 1 train.py    on node2

    Exit status: 0 when every worker succeeded, else that of the worker that failed first
    (128 + n if signal n ended it); 75 when training was saved after SIGTERM, or only lost
    another, and should be started again; 76 if the run hung, with a report of who was
    where; 130 after Ctrl-C; 1 if tfdist could not start the
    workers, 2 for a wrong command line.
    """  # noqa: D301
    if not module and not Path(script).is_file():
        raise click.BadParameter(
            f"SCRIPT must be a Python file. Received: {script!r}, which is "
            f"{'no file' if Path(script).exists() else 'not there'}. "
            "Check the path; the options of `tfdist run` come before it."
        )
    if synchronous and not servers:
        raise click.BadParameter(
            "--synchronous must come with parameter servers. Received: --synchronous without "
            "--ps. Add --ps 1, or leave it out: other strategies are synchronous."
        )
    if synchronous:
        os.environ["TFDIST_SYNCHRONOUS"] = "1"  # which the workers inherit
    machines = parse_hosts(hosts) if hosts is not None else ()
    roster = Roster(
        script_command((script, *arguments), module=module),
        workers=workers,
        hosts=machines,
        node_rank=node_rank,
        elastic=None if elastic is None else parse_elastic(elastic),
        port=port,
        strategy=strategy,
        drop_in=drop_in,
        servers=servers,
    )
    check_names(machines)
    if max_restarts is None and elastic is not None:
        max_restarts = 3
    # A lost worker is usual beside servers; an exception is started again where that was asked.
    restarts = (
        Restarts(3 if servers else 0, of_exceptions=False)
        if max_restarts is None
        else Restarts(max_restarts)
    )
    together: AbstractContextManager[CoordinatorClient | None] = nullcontext()
    if max_restarts and len(machines) > 1:
        together = joined(
            machines,
            node_rank or 0,
            port,
            max_restarts=max_restarts,
            limit=node_timeout,
            min_workers=None if roster.elastic is None else roster.elastic[0],
            strategy=strategy,
            ps=servers,
        )
    with together as client:
        outcome = run_workers(
            roster.workers,
            log_dir=log_dir,
            restarts=restarts,
            grace=grace,
            client=client,
            slots=roster.slots,
            plan=None if roster.elastic is None else roster.of_hosts,
            meeting=roster.meeting,
            shows_all=output == "all",
        )
    _explain(outcome, roster.workers, log_dir, has_other_hosts=len(machines) > 1)
    sys.exit(outcome.status)


def _explain(
    outcome: Outcome,
    planned: tuple[Worker, ...],
    log_dir: Path | None,
    has_other_hosts: bool = False,
) -> None:
    if outcome.interrupted == signal.SIGPIPE:
        # Standard output has no reader left: Python would complain about it at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    failure = outcome.failure
    if failure is None:
        if outcome.elsewhere is not None:
            again = " It came twice in a row at this step." if outcome.is_repeated else ""
            click.echo(
                click.style("Error: ", fg="red", bold=True)
                + f"{outcome.elsewhere.what}{again} All workers have been ended.",
                err=True,
            )
        for line in listed(outcome.restarts):
            click.echo(line, err=True)
        return
    lines = [click.style("Error: ", fg="red", bold=True) + failure.describe()]
    excerpt = failure.excerpt()
    if excerpt:
        lines[0] += " Its last lines:"
        bar = click.style("│", fg="red")
        lines += ["", *(f"  {bar} {line[:_WIDEST]}" for line in excerpt), ""]
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
    if len(planned) > 1:
        lines.append("All workers on this machine have been ended.")
    lines += listed(outcome.restarts)
    click.echo("\n".join(lines), err=True)
