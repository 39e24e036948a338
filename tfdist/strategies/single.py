"""One process with one device: Keras as it is, with tfdist's input pipeline."""

from __future__ import annotations

from tfdist.cluster import Cluster
from tfdist.strategies.base import Place, Strategy


class Single(Strategy):
    """One replica. It needs no reduction, and its variables stay where they are."""

    name = "single"
    is_plain = True

    def __init__(self, cluster: Cluster) -> None:
        self.place = Place()

    @classmethod
    def unavailable(cls, cluster: Cluster) -> str | None:
        """Returns None: this strategy can always run."""
        return None

    @classmethod
    def chosen_by(cls, cluster: Cluster) -> str | None:
        """Returns the reason for `auto`, which asks this strategy last."""
        return "one process and at most one accelerator"
