"""How a source is to be read."""

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
    """How a source is to be read.

    Attributes:
        batch_size: Examples of a full global batch, or None for 32 or what batches hold.
        steps: Steps an epoch, or None for all of the data.
        sampler: Chooses rows of arrays.
        shuffle: Whether a PyDataset's batches are shuffled.
        seed: The sampler's.
        training: Whether epochs go on where the last one stopped.
        class_weight: Weights by class number, a rule that finds them, or None.
        augment: Changes examples at random, or None.
        shard: How rows count of which each worker has its own, or None where all have all.
        strategy: Whose workers these are.
        private: Whether even counts of classes must stay on their worker.
        copies: How often each row that was drawn comes, one behind the other.
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
    """Gives the examples of a full global batch of arrays.

    Args:
        settings: What was asked for.

    Raises:
        ArgumentError: It is no whole number, or below 1.
    """
    batch_size = 32 if settings.batch_size is None else settings.batch_size
    if not isinstance(batch_size, int | np.integer) or batch_size < 1:
        raise ArgumentError(
            "`batch_size` must be a whole number of at least 1: the examples of one update "
            f"over all replicas. Received: batch_size={batch_size!r}."
        )
    return int(batch_size)
