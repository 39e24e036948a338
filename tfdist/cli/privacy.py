"""`tfdist privacy epsilon` and `tfdist privacy noise`."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from typing import Any, TypeVar

import click

_Command = TypeVar("_Command", bound=Callable[..., Any])


@click.group()
def privacy() -> None:
    """Compute the privacy cost of training with DP-SGD.

    It needs `pip install "tfdist[privacy]"`.

    \b
    Example:
      tfdist privacy epsilon --sample-size 60000 --batch-size 256 --epochs 60 \\
          --noise-multiplier 1.1 --delta 1e-5
    """  # noqa: D301


def _training(command: _Command) -> _Command:
    """Adds the options that describe a training run."""
    for option in reversed(
        (
            click.option(
                "--sample-size",
                type=click.IntRange(min=1),
                required=True,
                metavar="N",
                help="Number of examples in the training data.",
            ),
            click.option(
                "--batch-size",
                type=click.IntRange(min=1),
                required=True,
                metavar="B",
                help="Expected examples of a step. Each is drawn with probability B / N.",
            ),
            click.option(
                "--epochs",
                type=click.FloatRange(min=0, min_open=True),
                metavar="E",
                help="Number of epochs. An epoch has N / B steps, rounded up.",
            ),
            click.option(
                "--steps",
                type=click.IntRange(min=1),
                metavar="T",
                help="Number of steps, instead of --epochs.",
            ),
            click.option(
                "--delta",
                type=float,
                required=True,
                help="The delta of the guarantee. It should be far below 1 / N.",
            ),
            click.option(
                "--capacity",
                type=click.IntRange(min=1),
                metavar="C",
                help="The largest number of examples of a step.  [default: no limit]",
            ),
            click.option(
                "--accountant",
                type=click.Choice(("pld", "rdp")),
                default="pld",
                show_default=True,
                help="pld: privacy loss distributions (tight). rdp: Rényi divergences.",
            ),
            click.option(
                "--relation",
                type=click.Choice(("add_or_remove_one", "replace_special", "replace_one")),
                default="add_or_remove_one",
                show_default=True,
                help="Which data sets the guarantee makes indistinguishable.",
            ),
        )
    ):
        command = option(command)
    return command


@privacy.command("epsilon")
@_training
@click.option(
    "--noise-multiplier",
    type=float,
    required=True,
    metavar="S",
    help="The standard deviation of the noise, divided by the clipping norm.",
)
def show_epsilon(noise_multiplier: float, **run: Any) -> None:
    """Show the epsilon of a training run, and its meaning.

    \b
    Example:
      tfdist privacy epsilon --sample-size 60000 --batch-size 256 --epochs 60 \\
          --noise-multiplier 1.1 --delta 1e-5

    Exit status: 0, or 1 if there is no answer, 2 for a wrong command line.
    """  # noqa: D301
    _show(noise_multiplier, run)


@privacy.command("noise")
@_training
@click.option(
    "--target-epsilon",
    type=float,
    required=True,
    metavar="E",
    help="The epsilon that the whole run may spend.",
)
def show_noise(target_epsilon: float, **run: Any) -> None:
    """Show the smallest noise multiplier that keeps a training run within an epsilon.

    This takes some seconds.

    \b
    Example:
      tfdist privacy noise --sample-size 60000 --batch-size 256 --epochs 60 \\
          --target-epsilon 3 --delta 1e-5

    Exit status: 0, or 1 if there is no answer, 2 for a wrong command line.
    """  # noqa: D301
    from tfdist.privacy.accounting.dp_sgd import noise_multiplier

    smallest = noise_multiplier(
        target_epsilon=target_epsilon,
        sampling_probability=_probability(run),
        steps=_steps(run),
        delta=run["delta"],
        accountant=run["accountant"],
        relation=run["relation"],
        capacity=run["capacity"],
        num_rows=run["sample_size"],
    )
    noise = math.ceil(smallest * 1e6) / 1e6
    click.echo(f"noise_multiplier = {noise:.6f}")
    _show(noise, run)


def _show(noise_multiplier: float, run: dict[str, Any]) -> None:
    """Prints the epsilon of a run and its statement."""
    from tfdist.privacy.accounting.ledger import Ledger, Phase
    from tfdist.privacy.accounting.report import statement

    phase = Phase(
        _probability(run), noise_multiplier, _steps(run), run["capacity"], run["sample_size"]
    )
    ledger, delta = Ledger().add(phase), run["delta"]
    options = {"accountant": run["accountant"], "relation": run["relation"]}
    click.echo(f"epsilon = {ledger.epsilon(delta, **options):.6g}\n")
    text = statement(ledger, delta=delta, **options)
    click.echo(textwrap.fill(text, 88, break_on_hyphens=False))


def _probability(run: dict[str, Any]) -> float:
    if run["batch_size"] > run["sample_size"]:
        raise click.UsageError(
            "--batch-size must be at most --sample-size. Received: "
            f"{run['batch_size']} of {run['sample_size']}."
        )
    return float(run["batch_size"] / run["sample_size"])


def _steps(run: dict[str, Any]) -> int:
    if (run["epochs"] is None) == (run["steps"] is None):
        raise click.UsageError("Exactly one of --epochs and --steps must be given.")
    if run["steps"] is not None:
        return int(run["steps"])
    steps_per_epoch = -(-run["sample_size"] // run["batch_size"])
    steps: int = math.ceil(run["epochs"] * steps_per_epoch)
    return steps
