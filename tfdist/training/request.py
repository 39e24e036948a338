"""The arguments of one call of `fit`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tfdist.data.augment import Augment
from tfdist.samplers import Sampler
from tfdist.strategies.session import Session


@dataclass(frozen=True)
class Request:
    """The arguments of `fit`. An extension may replace some of them.

    Attributes:
        session: The session, with the strategy.
        model: A compiled `keras.Model`.
        seed_is_random: Whether neither the user nor an extension has chosen `seed`.
        seed_is_secret: Whether a privacy guarantee needs `seed` to stay secret.
        copies: Number of copies of each example, each with an augmentation of its own.
        is_private: Whether workers must exchange nothing about single examples, but sums.

    All other attributes are arguments of `tfdist.fit`.
    """

    session: Session
    model: Any
    x: Any
    y: Any
    sample_weight: Any
    batch_size: int | None
    epochs: int
    initial_epoch: int
    verbose: Any
    callbacks: Any
    validation_split: float
    validation_data: Any
    validation_steps: int | None
    validation_batch_size: int | None
    validation_freq: Any
    shuffle: Any
    class_weight: Any
    steps_per_epoch: int | None
    sampler: Sampler | None
    augment: Augment | None
    shard: Any
    seed: int | None
    whole_batch: bool | None
    seed_is_random: bool = False
    seed_is_secret: bool = False
    copies: int = 1
    is_private: bool = False

    @property
    def shows(self) -> bool:
        """Whether this process prints."""
        return bool(self.session.is_chief and self.verbose != 0)
