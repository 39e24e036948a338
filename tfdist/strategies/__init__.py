"""The distribution strategies. Each is found by its entry point."""

from __future__ import annotations

from tfdist.cluster import EVALUATOR, Cluster, strategy_names
from tfdist.cluster.strategy_names import names
from tfdist.errors import ArgumentError, StrategyError
from tfdist.strategies.base import Place, Strategy

__all__ = ["Place", "Strategy", "choose", "find", "names"]


def find(name: str) -> type[Strategy]:
    """Loads a strategy by its name.

    Args:
        name: As in `strategy=`.

    Raises:
        ArgumentError: There is no such strategy.
    """
    entry = strategy_names.entry(name)
    if entry is not None:
        loaded: type[Strategy] = entry.load()
        return loaded
    raise ArgumentError(
        "`strategy` must be 'auto', a tf.distribute.Strategy instance, or one of "
        f"{', '.join(map(repr, names()))}. Received: strategy={name!r}."
    )


def choose(name: str, cluster: Cluster) -> tuple[type[Strategy], str]:
    """Finds the strategy to use and says why.

    An evaluator is not part of the cluster. If the named strategy needs a cluster, the
    evaluator uses the strategy that "auto" selects.

    Args:
        name: As in `strategy=`. With "auto", each strategy says whether it fits the cluster.
        cluster: The cluster, and this process's task in it.

    Returns:
        The strategy's class, and the reason in a few words.

    Raises:
        StrategyError: The strategy cannot run in this process.
        ArgumentError: There is no such strategy.
    """
    if name != "auto":
        strategy = find(name)
        obstacle = strategy.unavailable(cluster)
        if obstacle is not None and cluster.job == EVALUATOR:
            return choose("auto", cluster)
        if obstacle is not None:
            raise StrategyError(
                f"The strategy must be able to run here. Received: strategy={name!r}, but "
                f"{obstacle}."
            )
        return strategy, "as asked for"
    # All of them, also those of other packages, are asked in the order of their priority.
    candidates = sorted(map(find, names()), key=lambda s: s.priority, reverse=True)
    for strategy in candidates:
        reason = strategy.chosen_by(cluster)
        if reason is None:
            continue
        obstacle = strategy.unavailable(cluster)
        if obstacle is not None:  # a fallback would train each process on its own
            raise StrategyError(
                f"The strategy that fits the cluster must be able to run here. Received: "
                f"strategy='auto', which is {strategy.name!r} ({reason}), but {obstacle}."
            )
        return strategy, reason
    raise StrategyError(f"No strategy fits this cluster. Received: {cluster}.")
