"""One process, one device: Keras as it is, with tfdist's data road."""

from __future__ import annotations

from tfdist.cluster import Cluster
from tfdist.strategies.base import Place, Strategy


class Single(Strategy):
    """One replica: nothing is reduced, nothing is moved."""

    name = "single"
    is_plain = True

    def __init__(self, cluster: Cluster) -> None:
        self.place = Place()

    @classmethod
    def unavailable(cls, cluster: Cluster) -> str | None:
        """Says why not: it always can."""
        return None

    @classmethod
    def chosen_by(cls, cluster: Cluster) -> str | None:
        """Says why `auto` chooses it: nothing else was found."""
        return "one process and at most one accelerator"
