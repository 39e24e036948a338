"""`tfdist run`: starts the worker processes of a script, and explains failures."""

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
    connect_launchers,
    parse_elastic,
    parse_hosts,
    restart_lines,
    run_workers,
    script_command,
)

# TensorFlow quotes generated code in its tracebacks, with lines of thousands of characters.
_MAX_LINE_LENGTH = 240


@click.command(context_settings={"allow_interspersed_args": False})
@click.option("-n", "--workers", type=int, help="Total number of workers.  [default: 1]")
@click.option(
    "--ps",
    "servers",
    type=int,
    default=0,
    metavar="N",
    help="Total number of parameter servers. The script then runs on an additional chief.",
)
@click.option(
    "--synchronous",
    is_flag=True,
    help="With --ps: all workers compute parts of the same batch, as in other strategies.",
)
@click.option(
    "--hosts", metavar="H:N,...", help="The machines, and the number of workers on each."
)
@click.option("--node-rank", type=int, metavar="I", help="Index of this machine in --hosts.")
@click.option(
    "--port",
    type=int,
    default=DEFAULT_PORT,
    show_default=True,
    help="With --hosts: the port of worker 0. Worker k uses this port + k.",
)
@click.option(
    "--strategy",
    type=click.Choice(["auto", *strategy_names.names()]),
    help="The strategy.  [default: the script's choice, or auto]",
)
@click.option(
    "--zero",
    type=int,
    metavar="STAGE",
    help="1: each worker keeps only its part of the optimizer's state. 3: of the weights too.",
)
@click.option(
    "--drop-in",
    is_flag=True,
    help="Distribute the Model.fit of a script that does not import tfdist.",
)
@click.option(
    "--output",
    type=click.Choice(("chief", "all")),
    default="chief",
    show_default=True,
    help="Whose output to show. chief: the chief's, and on other hosts that of the first "
    "worker. A worker that fails is always shown.",
)
@click.option(
    "--log-dir",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Also write the output of each worker to DIR/worker-<i>.log.",
)
@click.option(
    "--max-restarts",
    type=click.IntRange(min=0),
    metavar="N",
    help="Maximum number of restarts after failures.  [default: 0; 3 with --ps or --elastic]",
)
@click.option(
    "--elastic",
    metavar="MIN:MAX",
    help="Start MAX workers. If workers are lost, continue with at least MIN.",
)
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    default=SAVING_S,
    show_default=True,
    metavar="SECONDS",
    help="After SIGTERM: time in which workers with a checkpoint may save.",
)
@click.option(
    "--node-timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=NODE_TIMEOUT_S,
    show_default=True,
    metavar="SECONDS",
    help="With --hosts and --max-restarts: time to wait for a host to start or come back.",
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
    zero: int | None,
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

    All arguments after SCRIPT are passed to the script. The workers of a machine share its
    cores and GPUs. The first failure ends all workers. With --max-restarts they are
    then started again, unless the same failure happens twice in a row at the same step. If the
    script calls `fit(..., checkpoint=...)`, training continues from its last checkpoint, and
    SIGTERM saves and ends with status 75.

    \b
    Examples:
      tfdist run -n 2 train.py --epochs 5
      tfdist run -n 2 --ps 1 train.py      with a parameter server
      tfdist run -n 2 --max-restarts 5 train.py
      tfdist run --hosts node1:4,node2:4 --node-rank 0 train.py    on node1
      tfdist run --hosts node1:4,node2:4 --node-rank 1 train.py    on node2

    Exit status: 0 if every worker succeeded, else that of the worker that failed first
    (128 + n if signal n ended it). 75: start the run again, because training was saved after
    SIGTERM or another worker was lost. 76: the run hung; a report says where each worker was.
    130: Ctrl-C. 1: tfdist could not start the workers. 2: the command line is wrong.
    """  # noqa: D301
    _check_options(script, module, synchronous, servers, zero)
    if synchronous:
        os.environ["TFDIST_SYNCHRONOUS"] = "1"  # the workers inherit it
    if zero is not None:
        os.environ["TFDIST_ZERO"] = str(zero)
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
    connection: AbstractContextManager[CoordinatorClient | None] = nullcontext()
    if max_restarts and len(machines) > 1:
        # The launchers of several machines must agree on each restart.
        connection = connect_launchers(
            machines,
            node_rank or 0,
            port,
            max_restarts=max_restarts,
            limit=node_timeout,
            min_workers=None if roster.elastic is None else roster.elastic[0],
            strategy=strategy,
            ps=servers,
        )
    restarts, shows_all = _restarts(max_restarts, servers), output == "all"
    with connection as client:
        outcome = _run(roster, log_dir, restarts, grace, client, shows_all)
    _explain(outcome, roster.workers, log_dir, has_other_hosts=len(machines) > 1)
    sys.exit(outcome.status)


def _run(
    roster: Roster,
    log_dir: Path | None,
    restarts: Restarts,
    grace: float,
    client: CoordinatorClient | None,
    shows_all: bool,
) -> Outcome:
    """Runs the workers of this machine to their end."""
    return run_workers(
        roster.workers,
        log_dir=log_dir,
        restarts=restarts,
        grace=grace,
        client=client,
        slots=roster.slots,
        plan=None if roster.elastic is None else roster.of_hosts,
        meeting=roster.meeting,
        shows_all=shows_all,
    )


def _check_options(
    script: str, module: bool, synchronous: bool, servers: int, zero: int | None
) -> None:
    """Refuses a script that is not there, and options that contradict each other."""
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
    if zero not in (None, 1, 3):
        raise click.BadParameter(
            "--zero must be 1, the optimizer's state in parts, or 3, the weights too. "
            f"Received: --zero {zero}."
        )
    if zero is not None and servers:
        raise click.BadParameter(
            "--zero must come without parameter servers, which keep the optimizer's state "
            f"already. Received: --zero {zero} --ps {servers}. Leave one of them out."
        )


def _restarts(max_restarts: int | None, servers: int) -> Restarts:
    """Returns how often failed workers are started again."""
    if max_restarts is not None:
        return Restarts(max_restarts)
    # With servers a lost worker is usual. Exceptions cause a restart only if the user asked.
    return Restarts(3 if servers else 0, of_exceptions=False)


def _explain(
    outcome: Outcome,
    workers: tuple[Worker, ...],
    log_dir: Path | None,
    has_other_hosts: bool = False,
) -> None:
    if outcome.interrupted == signal.SIGPIPE:
        # Standard output has no reader any more, and Python would print an error at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    failure = outcome.failure
    if failure is None:
        if outcome.elsewhere is not None:
            repetition = (
                " It happened twice in a row at this step." if outcome.is_repeated else ""
            )
            click.echo(
                click.style("Error: ", fg="red", bold=True)
                + f"{outcome.elsewhere.what}{repetition} All workers have been ended.",
                err=True,
            )
        for line in restart_lines(outcome.restarts):
            click.echo(line, err=True)
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
    click.echo("\n".join(lines), err=True)
