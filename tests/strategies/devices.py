"""A strategy for tests of one process that stand for several replicas."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from tfdist.strategies.base import Place, Strategy


class Devices(Strategy):
    """Stands for a process with several replicas, of which it gives and keeps copies."""

    name = "devices"

    def __init__(self, replicas: int, values: Any = None, place: Place | None = None) -> None:
        self.place = place or Place(replicas, 0, replicas)
        self.values = values

    @classmethod
    def unavailable(cls, cluster: Any) -> str | None:
        return None

    def local_tensors(self, variable: Any) -> list[Any]:
        return [tf.convert_to_tensor(value) for value in self.values]

    def assign_copies(self, variable: Any, values: Any) -> None:
        self.values = np.stack(values)
