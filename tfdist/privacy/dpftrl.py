"""Private training without sampling: every example in its turn, with correlated noise."""

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

    Every example takes part once an epoch, always in the same step of it, so nothing has to
    be drawn in secret, and data may also be a `tf.data.Dataset` or a `PyDataset`. In place of
    the privacy that sampling gives, each step takes back a part of the noise of the steps
    before, so that the weights, the sum of all steps, hold much less of it (Kairouz et al.,
    "Practical and private (deep) learning without sampling or shuffling", ICML 2021; here
    with banded inverse square roots, Kalinin et al., "Back to square roots", ICLR 2026). The
    numbers of earlier steps are drawn again rather than kept, so it costs time, and no memory.

    Args:
        bands: Of how many steps the noise of one is made, itself included; 1 is independent
            noise. Time for noise grows with it.
        min_separation: Of a data set of batches that is gone through more than once: the least
            number of steps from one that an example takes part in to its next. A promise of
            yours: without reshuffling it is the number of its batches. Also needed for one
            pass where a data set may hold an example twice. Arrays have an order of their
            own, the same in each epoch.
        relation: "replace_special", or "replace_one". An example that is added would move all
            others to other batches.

    The other arguments are `DPSGD`'s, with these differences: noise of `noise_multiplier` is
    what each step draws, before parts of it are taken back; `group_ids` and `target_quantile`
    cannot be used; only `seed` makes the noise known, not the `seed` of `fit`.

    Raises:
        ArgumentError: As `DPSGD`, or a value is out of its range.

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
                "`relation` must be 'replace_special' or 'replace_one' without sampling: an "
                "example that is added moves others to other batches. Received: "
                f"relation={self.relation!r}."
            )
        if self.is_scheduled:
            raise ArgumentError(
                "`noise_multiplier` and `l2_norm_clip` must be numbers with DPFTRL: noise that "
                "is taken back must be as large as when it was given. Received: a schedule. "
                "Use DPSGD."
            )
        for name in ("group_ids", "target_quantile"):
            if getattr(self, name) is not None:
                raise ArgumentError(
                    f"`{name}` must be None with DPFTRL: a user may come in several steps of "
                    "an epoch, and noise that is taken back must be of one norm. Received: "
                    f"{name}. Use DPSGD."
                )


@dataclass(frozen=True)
class SameOrder(Sampler):
    """Takes every row once an epoch, in batches that are the same in each epoch.

    Args:
        shuffled: Whether rows are shuffled, once; else they keep their order.
    """

    may_be_empty: ClassVar[bool] = True  # so that a share always says what counts

    shuffled: bool = True

    def rows(self, step: int, *, num_rows: int, batch_size: int, seed: int) -> Rows:
        """Gives the rows of one global batch; see `Sampler.rows`."""
        order = Uniform() if self.shuffled else Sequential()
        step %= self.steps_per_epoch(num_rows, batch_size)
        return order.rows(step, num_rows=num_rows, batch_size=batch_size, seed=seed)
