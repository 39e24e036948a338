"""Private training without sampling: examples take part in turn, and noise is correlated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tfdist.errors import ArgumentError
from tfdist.privacy.accounting.arguments import check_count
from tfdist.privacy.settings import DPSGD
from tfdist.samplers import Rows, Sampler, Sequential, Uniform


@dataclass(frozen=True)
class DPFTRL(DPSGD):
    """Private training without sampling, for `fit(..., privacy=DPFTRL(...))`.

    Each example takes part once an epoch, always in the same step of the epoch. So nothing is
    drawn in secret, and the data may also be a `tf.data.Dataset` or a `PyDataset`. Instead of
    the privacy of sampling, each step subtracts a part of the noise of the steps before it. The
    weights are the sum of all steps, and have much less noise then (Kairouz et al., "Practical
    and private (deep) learning without sampling or shuffling", ICML 2021; the factors are
    banded inverse square roots, Kalinin et al., "Back to square roots", ICLR 2026). The numbers
    of earlier steps are drawn again instead of stored, which costs time but no memory.

    Args:
        bands: The number of steps whose noise a step combines, with its own. 1 is independent
            noise. The time for noise grows with `bands`.
        min_separation: The least number of steps between two steps in which an example takes
            part. It is your promise about a data set of batches, needed for more than one
            epoch, and for one epoch if the data set may contain an example twice. Without
            reshuffling it is the number of batches, with it 1. Leave it None for arrays, which
            tfdist orders equally in each epoch.
        relation: "replace_special", or "replace_one". An added example would move all others to
            other batches.

    The other arguments are those of `DPSGD`, with these differences: `noise_multiplier` is the
    noise that a step draws, before parts of it are subtracted. `group_ids` and
    `target_quantile` cannot be used. Only `seed` makes the noise known, not the `seed` of
    `fit`.

    Raises:
        ArgumentError: As in `DPSGD`, or a value is out of its range.

    Example:
        >>> import keras, numpy as np, tfdist
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        >>> model.compile(optimizer="sgd", loss="mse")
        >>> x, y = np.ones((100, 4), "float32"), np.ones((100, 1), "float32")
        >>> privacy = tfdist.DPFTRL(l2_norm_clip=1.0, noise_multiplier=8.0, delta=1e-3)
        >>> history = tfdist.fit(model, x, y, batch_size=10, verbose=0, privacy=privacy)
        >>> history.privacy.ledger.steps, round(history.privacy.epsilon, 1)
        (10, 0.4)
    """

    samples: ClassVar[bool] = False

    relation: str = "replace_special"
    bands: int = 8
    min_separation: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("bands", self.bands, 1)
        if self.min_separation is not None:
            check_count("min_separation", self.min_separation, 1)
        if self.relation == "add_or_remove_one":
            raise ArgumentError(
                "`relation` must be 'replace_special' or 'replace_one' with DPFTRL: an added "
                "example would move all others to other batches. Received: "
                f"relation={self.relation!r}. Use one of the two."
            )
        if self.is_scheduled:
            raise ArgumentError(
                "`noise_multiplier` and `l2_norm_clip` must be numbers with DPFTRL: later "
                "steps subtract noise, so it must have the same size in all steps. Received: a "
                "schedule. Pass numbers, or use DPSGD."
            )
        for name, reason in (
            ("group_ids", "a user may come in several steps of an epoch"),
            ("target_quantile", "later steps subtract noise, which must be of the same norm"),
        ):
            if (value := getattr(self, name)) is not None:
                raise ArgumentError(
                    f"`{name}` must be None with DPFTRL: {reason}. Received: {name} of type "
                    f"{type(value).__name__}. Leave it out, or use DPSGD."
                )


@dataclass(frozen=True)
class SameOrder(Sampler):
    """Takes every row once an epoch, in batches that are the same in each epoch.

    Args:
        shuffled: Whether rows are shuffled once. Otherwise they keep their order.
    """

    may_be_empty: ClassVar[bool] = True  # so that batches have a mask of the rows that count

    shuffled: bool = True

    def rows(self, step: int, *, num_rows: int, batch_size: int, seed: int) -> Rows:
        """Returns the rows of one global batch; see `Sampler.rows`."""
        order = Uniform() if self.shuffled else Sequential()
        step %= self.steps_per_epoch(num_rows, batch_size)
        return order.rows(step, num_rows=num_rows, batch_size=batch_size, seed=seed)
