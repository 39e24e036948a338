"""The names of the installed strategies, from entry points. No TensorFlow is needed."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

_GROUP = "tfdist.strategies"
_BUILT_IN = ("single", "mirrored", "multi_worker", "horovod", "parameter_server", "tpu")


def names() -> list[str]:
    """Lists the values of `strategy=`: tfdist's strategies, then those of other packages."""
    installed = {entry.name for entry in entry_points(group=_GROUP)}
    return [*_BUILT_IN, *sorted(installed.difference(_BUILT_IN))]


def entry(name: str) -> EntryPoint | None:
    """Finds the entry point of a strategy.

    Args:
        name: The value of `strategy=`.

    Returns:
        The entry point; None if no installed package has such a strategy.
    """
    return next(iter(entry_points(group=_GROUP, name=name)), None)


def of_other_packages() -> dict[str, str]:
    """Returns the strategies of other packages, with the package of each."""
    others = [e for e in entry_points(group=_GROUP) if e.name not in _BUILT_IN]
    return {e.name: e.dist.name if e.dist else "an unknown package" for e in others}
