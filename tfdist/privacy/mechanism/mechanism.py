"""What a private step does to the gradients."""

from __future__ import annotations

from dataclasses import dataclass

from tfdist.privacy.accounting.correlated import banded, coefficients, inverse
from tfdist.privacy.schedules import StepSchedule


@dataclass(frozen=True)
class Mechanism:
    """What is done to the gradients of one step.

    Attributes:
        l2_norm_clip: As in `DPSGD`; the first step's, if there is a schedule.
        noise_multiplier: As in `DPSGD`, found if need be; the least, if there is a schedule.
        expected_batch: `batch_size`: the examples that a step draws on average, if there are
            as many.
        microbatch_size: As in `DPSGD`.
        per_layer: Whether `DPSGD`'s `clipping` is.
        expected_units: What is clipped in a step on average: users, or examples.
        rows_of_user: The most examples of a user in a step; None without `group_ids`.
        copies: Rows of an example, whose mean counts.
        bands: As in `tfdist.DPFTRL`; None where each step has noise of its own alone.
        cyclic: Whether they are those of `DPSGD`.
        schedule: What each step gets; None if all get the same.
    """

    l2_norm_clip: float
    noise_multiplier: float
    expected_batch: float
    microbatch_size: int | None = None
    per_layer: bool = False
    target_quantile: float | None = None
    clip_learning_rate: float = 0.2
    count_noise: float = 0.0
    expected_units: float = 0.0
    rows_of_user: int | None = None
    copies: int = 1
    bands: int | None = None
    cyclic: bool = False
    schedule: StepSchedule | None = None

    @property
    def factors(self) -> tuple[float, ...]:
        """With what factors the noise of a step and those before is added up.

        Of `cyclic` ones, those that matter.
        """
        bands = self.bands or 1
        return inverse(banded(bands), 16 * bands) if self.cyclic else coefficients(bands)

    def most(self, replicas: int) -> float:
        """Says how long a sum of clipped gradients may be, practically, in norms.

        What is drawn with a mean of b is above 2 b + 64 with a probability below 2^-64
        (Chernoff's bound), and rows are dealt out evenly.

        Args:
            replicas: Among which a step's rows are.
        """
        rows = max(self.expected_batch, self.expected_units)
        return 2 * rows + (64 + replicas) * (self.rows_of_user or 1)

    @property
    def gradient_noise(self) -> float:
        """The noise on the sum of gradients, in units of the norm that is clipped to.

        With a noisy count beside it, of which an example can change at most 1/2 once 1/2 is
        subtracted from each, the two Gaussian mechanisms together cost as much as one of
        `noise_multiplier` (Andrew et al., theorem 1).
        """
        if self.target_quantile is None or self.noise_multiplier == 0:
            return self.noise_multiplier
        return float((self.noise_multiplier**-2 - (2 * self.count_noise) ** -2) ** -0.5)
