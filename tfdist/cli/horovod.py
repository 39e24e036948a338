"""`tfdist horovod`: builds and installs Horovod."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import click


@click.group()
def horovod() -> None:
    """Get Horovod for the installed TensorFlow.

    \b
    Example:
      tfdist horovod build
    """  # noqa: D301


@horovod.command("build")
@click.option(
    "--cache-dir",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Where wheels are kept.  [default: TFDIST_CACHE_DIR, else ~/.cache/tfdist]",
)
@click.option("--force", is_flag=True, help="Build anew even if the wheel is there.")
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    metavar="N",
    help="Files compiled at once.  [default: as many as cores and memory allow]",
)
@click.option("--no-install", is_flag=True, help="Only make the wheel, and print its path.")
def build_horovod(
    cache_dir: Path | None, force: bool, jobs: int | None, no_install: bool
) -> None:
    """Build Horovod against the installed TensorFlow, install it and check it.

    Minutes the first time; afterwards the wheel is kept, for this Horovod, TensorFlow and
    Python. Horovod's own build options are taken from the environment. It needs compilers
    for C and C++, make, and what `pip install "tfdist[horovod]"` brings.

    \b
    Examples:
      tfdist horovod build
      HOROVOD_GPU_OPERATIONS=NCCL tfdist horovod build    with NCCL, for GPUs

    Exit status: 0 when two processes summed their numbers with it, else 1; 130 after Ctrl-C.
    """  # noqa: D301
    from tfdist.launch.horovod_wheel.build import build, check, install

    try:
        wheel = build(cache_dir=cache_dir, force=force, jobs=jobs)
        if no_install:
            click.echo(wheel)
            return
        install(wheel)
        check(log_folder=wheel.parent)
    except KeyboardInterrupt:
        click.echo("Interrupted.", err=True)
        sys.exit(128 + signal.SIGINT)
