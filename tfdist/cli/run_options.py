"""The values of the options of `tfdist run`: what they contradict, and what they mean."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from tfdist.cluster.mesh_text import parse_mesh
from tfdist.cluster.warning_signals import ON_WARNING, PREEMPT_STATUS
from tfdist.errors import START_ME_AGAIN, ArgumentError
from tfdist.launch import RestartLimit, Shows


@dataclass(frozen=True)
class RunOptions:
    """The options and arguments of one call of `tfdist run`, as click names them.

    The texts of `tfdist run --help` say what each of them is. None means that it is not given.
    """

    workers: int | None
    servers: int
    synchronous: bool
    hosts: str | None
    ssh: bool
    joined: bool
    node_rank: int | None
    port: int
    strategy: str | None
    zero: int | None
    mesh: str | None
    drop_in: bool
    output: Shows
    log_dir: Path | None
    max_restarts: str | None
    elastic: str | None
    grace: float
    on_warning: str
    on_preempt_status: int
    health: str | None
    node_timeout: float
    explain: bool
    module: bool
    script: str
    arguments: tuple[str, ...]

    @property
    def program(self) -> tuple[str, ...]:
        """The script and its arguments."""
        return (self.script, *self.arguments)

    @property
    def asks_for_restarts(self) -> bool:
        """Whether the user asked for restarts: only then exceptions cause one too."""
        return self.max_restarts is not None or self.elastic is not None

    def restart_limit(self) -> RestartLimit:
        """Returns how often failed workers are started again.

        Raises:
            LaunchError: --max-restarts is malformed.
        """
        if self.max_restarts is not None:
            return RestartLimit.parse(self.max_restarts)
        # Lost workers are usual there.
        return RestartLimit(3 if self.servers or self.elastic is not None else 0)

    def for_workers(self) -> dict[str, str]:
        """Returns the environment variables that tell the options to the workers."""
        variables = {}
        if self.synchronous:
            variables["TFDIST_SYNCHRONOUS"] = "1"
        if self.zero is not None:
            variables["TFDIST_ZERO"] = str(self.zero)
        if self.mesh is not None:
            variables["TFDIST_MESH"] = self.mesh
        if self.on_warning == "end":
            variables[ON_WARNING] = "end"
        if self.on_preempt_status != START_ME_AGAIN:
            variables[PREEMPT_STATUS] = str(self.on_preempt_status)
        return variables

    def check(self) -> None:
        """Refuses options that are malformed or contradict each other.

        Raises:
            BadParameter: They are, and do.
        """
        check_synchronous(self.synchronous, self.servers)
        if self.zero not in (None, 1, 3):
            raise click.BadParameter(
                "--zero must be 1, the optimizer's state in parts, or 3, the weights too. "
                f"Received: --zero {self.zero}."
            )
        if self.zero is not None and self.servers:
            raise click.BadParameter(
                "--zero must come without parameter servers, which keep the optimizer's state "
                f"already. Received: --zero {self.zero} --ps {self.servers}. Leave one of them "
                "out."
            )
        self._check_mesh()

    def _check_mesh(self) -> None:
        if self.mesh is None:
            return
        try:
            parse_mesh(self.mesh)
        except ArgumentError as error:
            raise click.BadParameter(f"--mesh: {error}") from None
        for option, value in (("--zero", self.zero), ("--ps", self.servers)):
            if value:
                raise click.BadParameter(
                    "--mesh must come without --zero and --ps, which keep state in another "
                    f"way. Received: --mesh {self.mesh} {option} {value}. Leave one of them "
                    "out."
                )


def check_synchronous(synchronous: bool, servers: int) -> None:
    """Refuses --synchronous where nothing is asynchronous.

    Args:
        synchronous: Whether the option is given.
        servers: The number of parameter servers.

    Raises:
        BadParameter: It is given without servers.
    """
    if synchronous and not servers:
        raise click.BadParameter(
            "--synchronous must come with parameter servers. Received: --synchronous without "
            "--ps. Add --ps 1, or leave it out: other strategies are synchronous."
        )
