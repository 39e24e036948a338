"""The command `tfdist`: its subcommands, and the display of errors."""

from __future__ import annotations

from typing import Any

import click

from tfdist._version import __version__
from tfdist.cli.config import config
from tfdist.cli.doctor import doctor
from tfdist.cli.examine import estimate, recommend
from tfdist.cli.horovod import horovod
from tfdist.cli.privacy import privacy
from tfdist.cli.run import run
from tfdist.cli.self_test import self_test
from tfdist.errors import TfdistError

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 96}


class _Commands(click.Group):
    """Shows tfdist's errors as a message without a traceback, with exit status 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TfdistError as error:
            raise click.ClickException(str(error)) from None


@click.group(cls=_Commands, context_settings=_CONTEXT)
@click.version_option(__version__, prog_name="tfdist", message="%(prog)s %(version)s")
def main() -> None:
    """Distributed training for Keras 3 on TensorFlow.

    \b
    Examples:
      tfdist run -n 2 train.py             train in two worker processes
      tfdist run -n 2 --drop-in train.py   the same, for a plain Keras script
      tfdist config -n 2                   write tfdist.toml, which `tfdist run` reads
      tfdist recommend train.py            say which strategy is best, and why
      tfdist estimate train.py             say whether it fits into memory
      tfdist test -n 2                     test and measure training in two workers
      tfdist doctor                        show what can run on this machine
      tfdist horovod build                 build Horovod for the installed TensorFlow
      tfdist privacy epsilon --help        compute the cost of training with DP-SGD
    """  # noqa: D301


for command in (run, config, recommend, estimate, self_test, doctor, horovod, privacy):
    main.add_command(command)
