"""The settings of a data source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tfdist.data.augment import Augment
from tfdist.data.local import LocalShard
from tfdist.errors import ArgumentError
from tfdist.samplers import Sampler
from tfdist.strategies.base import Strategy


@dataclass(frozen=True)
class SourceSettings:
    """The settings of a data source.

    Attributes:
        batch_size: Examples of a full global batch. None means 32 for arrays, and the size of
            the batches for other data.
        steps: Steps an epoch, or None for all of the data.
        sampler: Chooses rows of arrays.
        shuffle: Whether a PyDataset's batches are shuffled.
        seed: The sampler's seed.
        training: Whether an epoch goes on where the last one stopped.
        class_weight: Weights by class number, a rule for the weights, or None.
        augment: The augmentation, or None.
        shard: How the rows of each worker count, or None if all workers have all rows.
        strategy: The strategy of the workers.
        private: Whether even class counts must not leave their worker.
        copies: How often each drawn row is repeated, one copy after the other.
    """

    batch_size: int | None
    steps: int | None
    sampler: Sampler
    shuffle: bool
    seed: int
    training: bool
    class_weight: Any = None
    augment: Augment | None = None
    shard: LocalShard | None = None
    strategy: Strategy | None = None
    private: bool = False
    copies: int = 1


def checked_batch_size(settings: SourceSettings) -> int:
    """Returns the examples of a full global batch of arrays.

    Args:
        settings: The settings of the source.

    Raises:
        ArgumentError: `batch_size` is not a whole number, or below 1.
    """
    batch_size = 32 if settings.batch_size is None else settings.batch_size
    if not isinstance(batch_size, int | np.integer) or batch_size < 1:
        raise ArgumentError(
            "`batch_size` must be a whole number of at least 1: the examples of one update "
            f"over all replicas. Received: batch_size={batch_size!r}."
        )
    return int(batch_size)
