"""`tfdist run`: starts the worker processes of a script, and explains failures."""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import click

from tfdist.cli.examine import explain_run
from tfdist.cli.explanation import explain as explain_end
from tfdist.cli.settings_file import CommandWithFile, read_file
from tfdist.cli.ssh import check_ssh, task_of
from tfdist.cli.target import check_script
from tfdist.cluster import strategy_names
from tfdist.cluster.mesh_text import parse_mesh
from tfdist.cluster.warning_signals import ON_WARNING, PREEMPT_STATUS
from tfdist.errors import START_ME_AGAIN, ArgumentError
from tfdist.launch import (
    DEFAULT_PORT,
    INTERRUPTED_S,
    NODE_TIMEOUT_S,
    SAVING_S,
    TOKEN,
    CoordinatorClient,
    Journal,
    RestartLimit,
    Restarts,
    Roster,
    Shows,
    check_names,
    connect_launchers,
    count_on_processor,
    crowded_cores,
    events_name,
    exposed_ports,
    health_of,
    open_standard_streams,
    parse_elastic,
    parse_hosts,
    remote_launchers,
    run_workers,
    script_command,
    share_token,
)


@click.command(cls=CommandWithFile, context_settings={"allow_interspersed_args": False})
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    is_eager=True,
    expose_value=False,
    callback=read_file,
    help="A file with options.  [default: tfdist.toml, if it is there]",
)
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
@click.option(
    "--ssh",
    is_flag=True,
    help="With --hosts: start `tfdist run` on the other hosts too, with ssh.",
)
@click.option("--joined", is_flag=True, hidden=True, help="Set for the others by --ssh.")
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
    "--mesh",
    metavar="AXES",
    help="Divide layers over workers, such as batch=2,model=2: each two workers compute them "
    "together.",
)
@click.option(
    "--drop-in",
    is_flag=True,
    help="Distribute the Model.fit of a script that does not import tfdist.",
)
@click.option(
    "--output",
    type=click.Choice(("chief", "all", "failed")),
    default="chief",
    show_default=True,
    help="Whose output to show. chief: the chief's, and on other hosts that of the first "
    "worker. failed: only that of workers that fail, which the others show too.",
)
@click.option(
    "--log-dir",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Also write the output of each worker to DIR/worker-<i>.log, and events of the run to "
    "DIR/events.jsonl. Logs of earlier starts are kept as worker-<i>.attempt-<k>.log.",
)
@click.option(
    "--max-restarts",
    metavar="N[/TIME]",
    help="Maximum number of restarts after failures; 3/10m: 3 in any 10 minutes.  "
    "[default: 0; 3 with --ps or --elastic]",
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
    "--on-warning",
    type=click.Choice(("save", "end")),
    default="save",
    show_default=True,
    help="What SIGUSR1 and SIGUSR2, SLURM's warnings, do in a fit with checkpoints. save: "
    "training is saved and goes on. end: it is saved and ends, as after SIGTERM.",
)
@click.option(
    "--on-preempt-status",
    type=click.IntRange(min=0, max=255),
    default=START_ME_AGAIN,
    show_default=True,
    metavar="STATUS",
    help="Exit status that asks for the run to be started again.",
)
@click.option(
    "--health",
    metavar="PORT|FILE",
    help="Answer probes: at PORT by HTTP (/livez, /readyz), or in FILE, which is written anew "
    "every 5 s.",
)
@click.option(
    "--node-timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=NODE_TIMEOUT_S,
    show_default=True,
    metavar="SECONDS",
    help="With --hosts and --max-restarts: time to wait for a host to start or come back.",
)
@click.option(
    "--explain",
    is_flag=True,
    help="Start no worker: predict each strategy for these workers, as `tfdist recommend`.",
)
@click.option("-m", "--module", is_flag=True, help="SCRIPT is a module, as after python -m.")
@click.argument("script")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[ARGUMENTS]...")
def run(
    workers: int | None,
    servers: int,
    synchronous: bool,
    hosts: str | None,
    ssh: bool,
    joined: bool,
    node_rank: int | None,
    port: int,
    strategy: str | None,
    zero: int | None,
    mesh: str | None,
    drop_in: bool,
    output: Shows,
    log_dir: Path | None,
    max_restarts: str | None,
    elastic: str | None,
    grace: float,
    on_warning: str,
    on_preempt_status: int,
    health: str | None,
    node_timeout: float,
    explain: bool,
    module: bool,
    script: str,
    arguments: tuple[str, ...],
) -> None:
    """Run SCRIPT in one or more worker processes.

    All arguments after SCRIPT are passed to the script. The workers of a machine share its
    cores and GPUs. The first failure ends all workers. With --max-restarts they are
    then started again, unless the same failure happens twice in a row at the same step. If the
    script calls `fit(..., checkpoint=...)`, training continues from its last checkpoint,
    SIGTERM saves and ends with status 75, and SIGUSR1 and SIGUSR2 save.

    \b
    Examples:
      tfdist run -n 2 train.py --epochs 5
      tfdist run -n 2 --ps 1 train.py      with a parameter server
      tfdist run -n 2 --max-restarts 5/1h train.py
      tfdist run --hosts node1:4,node2:4 --ssh train.py    on node1
      tfdist run --hosts node1:4,node2:4 --node-rank 0 train.py    on node1
      tfdist run --hosts node1:4,node2:4 --node-rank 1 train.py    on node2

    Exit status: 0 if every worker succeeded, else that of the worker that failed first
    (128 + n if signal n ended it). 75, or --on-preempt-status: start the run again, because
    training was saved after a signal or another worker was lost. 76: the run hung; a report
    says where each worker was. 130: Ctrl-C. 1: tfdist could not start the workers. 2: the
    command line is wrong.
    """  # noqa: D301
    open_standard_streams()
    check_script(script, module)
    _check_options(synchronous, servers, zero)
    _check_mesh(mesh, zero, servers)
    if explain:
        sys.exit(explain_run((script, *arguments), module, workers, servers, hosts))
    if synchronous:
        os.environ["TFDIST_SYNCHRONOUS"] = "1"  # the workers inherit it
    if zero is not None:
        os.environ["TFDIST_ZERO"] = str(zero)
    if mesh is not None:
        os.environ["TFDIST_MESH"] = mesh
    if on_warning == "end":
        os.environ[ON_WARNING] = "end"
    if on_preempt_status != START_ME_AGAIN:
        os.environ[PREEMPT_STATUS] = str(on_preempt_status)
    restart_limit = _restart_limit(max_restarts, servers, elastic)
    machines = parse_hosts(hosts) if hosts is not None else ()
    others = None
    if ssh:
        node_rank = check_ssh(machines, node_rank)
        others = task_of(click.get_current_context(), can_return=restart_limit.count > 0)
    if strategy == "horovod":
        share_token(machines, node_rank, node_timeout)  # for the secret of its ranks
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
    connection: AbstractContextManager[CoordinatorClient | None] = nullcontext()
    is_asked_for = max_restarts is not None or elastic is not None
    is_restarted = is_asked_for and restart_limit.count > 0
    if (is_restarted or ssh or joined) and len(machines) > 1:
        # The launchers of several machines must agree on each restart.
        share_token(machines, node_rank, node_timeout)
        connection = connect_launchers(
            machines,
            node_rank or 0,
            port,
            os.environ[TOKEN],
            max_restarts=restart_limit,
            limit=node_timeout,
            min_workers=None if roster.elastic is None else roster.elastic[0],
            strategy=strategy,
            ps=servers,
        )
    # With servers a lost worker is usual. Exceptions cause a restart only if the user asked.
    restarts = Restarts(restart_limit, of_exceptions=is_asked_for)
    journal = Journal(log_dir, events_name(roster.workers))
    with (
        health_of(journal, health),
        journal.ended_by_errors(),
        connection as client,
        remote_launchers(machines, others) as remotes,
    ):
        is_met_here = client is not None and node_rank == 0
        if exposed := exposed_ports(roster.workers, port - 1 if is_met_here else None):
            click.echo(exposed, err=True)
        if crowded := crowded_cores(count_on_processor(roster.workers)):
            click.echo(crowded, err=True)
        outcome = run_workers(
            roster.workers,
            log_dir=log_dir,
            restarts=restarts,
            grace=grace,
            client=client,
            slots=roster.slots,
            plan=None if roster.elastic is None else roster.of_hosts,
            meeting=roster.meeting,
            shows=output,
            plan_again=roster.again,
            warnings_end=on_warning == "end",
            journal=journal,
        )
        if remotes is not None and outcome.interrupted:
            remotes.close(INTERRUPTED_S)
    status = on_preempt_status if outcome.status == START_ME_AGAIN else outcome.status
    journal.note_end(status, outcome.what)
    explain_end(outcome, roster.workers, log_dir, has_other_hosts=len(machines) > 1)
    sys.exit(status)


def _check_options(synchronous: bool, servers: int, zero: int | None) -> None:
    """Refuses options that contradict each other."""
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


def _check_mesh(mesh: str | None, zero: int | None, servers: int) -> None:
    """Refuses a mesh that is malformed, or that other options contradict."""
    if mesh is None:
        return
    try:
        parse_mesh(mesh)
    except ArgumentError as error:
        raise click.BadParameter(f"--mesh: {error}") from None
    for option, value in (("--zero", zero), ("--ps", servers)):
        if value:
            raise click.BadParameter(
                "--mesh must come without --zero and --ps, which keep state in another way. "
                f"Received: --mesh {mesh} {option} {value}. Leave one of them out."
            )


def _restart_limit(max_restarts: str | None, servers: int, elastic: str | None) -> RestartLimit:
    """Returns how often failed workers are started again."""
    if max_restarts is not None:
        return RestartLimit.parse(max_restarts)
    return RestartLimit(3 if servers or elastic is not None else 0)
