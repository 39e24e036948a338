"""The names of strategies, found by entry point. No TensorFlow is needed."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

_GROUP = "tfdist.strategies"
_OWN = ("single", "mirrored", "multi_worker", "horovod", "parameter_server", "tpu")


def names() -> list[str]:
    """Lists the names that `strategy=` takes: tfdist's, then those of other packages."""
    installed = {entry.name for entry in entry_points(group=_GROUP)}
    return [*_OWN, *sorted(installed.difference(_OWN))]


def entry(name: str) -> EntryPoint | None:
    """Finds what defines a strategy.

    Args:
        name: As in `strategy=`.

    Returns:
        Its entry point; None if no installed package has it.
    """
    return next(iter(entry_points(group=_GROUP, name=name)), None)


def of_other_packages() -> dict[str, str]:
    """Gives the strategies of other packages, with the package of each."""
    others = [e for e in entry_points(group=_GROUP) if e.name not in _OWN]
    return {e.name: e.dist.name if e.dist else "an unknown package" for e in others}
