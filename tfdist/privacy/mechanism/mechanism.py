"""The settings of a private step: clipping, noise and the expected batch."""

from __future__ import annotations

from dataclasses import dataclass

from tfdist.privacy.accounting.correlated import banded, coefficients, inverse
from tfdist.privacy.schedules import StepSchedule


@dataclass(frozen=True)
class Mechanism:
    """How a step clips gradients and adds noise.

    Attributes:
        l2_norm_clip: As in `DPSGD`. With a schedule it is the norm of the first step.
        noise_multiplier: As in `DPSGD`, calibrated if the user set a target. With a schedule it
            is the least multiplier.
        expected_batch: The `batch_size` of `fit`, by which sums are divided.
        microbatch_size: As in `DPSGD`.
        per_layer: Whether `clipping` of `DPSGD` is "per_layer".
        target_quantile: As in `DPSGD`.
        clip_learning_rate: As in `DPSGD`.
        count_noise: The standard deviation of the noise on the number of unclipped units.
        expected_units: The users, or examples, of a step on average.
        rows_of_user: The most examples of a user in a step. None without `group_ids`.
        copies: The number of augmented rows of an example, whose mean gradient is clipped.
        bands: As in `tfdist.DPFTRL`. None if the noise of steps is independent.
        cyclic: Whether `bands` was given to `DPSGD`, with sampling from groups in turn.
        schedule: The norm and the noise of each step. None if all steps are equal.
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
        """The factors of a step's own noise, of that of the step before, and so on.

        With `cyclic` the series does not end. It is cut off after `16 * bands` factors.
        """
        bands = self.bands or 1
        return inverse(banded(bands), 16 * bands) if self.cyclic else coefficients(bands)

    def sum_bound(self, replicas: int) -> float:
        """Bounds the norm of a step's sum of clipped gradients, in clipping norms.

        The bound fails with a probability below 2^-64: a Poisson sample with mean b has more
        than 2 b + 64 units with at most that probability, by Chernoff's bound. Rows are split
        evenly over replicas, up to one unit each, which the term `replicas` covers.

        Args:
            replicas: The number of replicas over which a step's rows are split.
        """
        # With `group_ids`, a step has fewer units than rows. The larger number bounds both.
        rows = max(self.expected_batch, self.expected_units)
        return 2 * rows + (64 + replicas) * (self.rows_of_user or 1)

    @property
    def gradient_noise(self) -> float:
        """The noise on the sum of gradients, in units of the clipping norm.

        With `target_quantile` a step also releases a noisy count, which an example changes by
        at most 1/2. The noise of both is chosen so that the two Gaussian mechanisms together
        cost as much as one with `noise_multiplier` (Andrew et al., theorem 1).
        """
        if self.target_quantile is None:
            return self.noise_multiplier
        return noise_beside_count(self.noise_multiplier, self.count_noise)


def noise_beside_count(noise_multiplier: float, count_noise: float) -> float:
    """Returns the noise on sums that are released with a count for an adaptive norm.

    Args:
        noise_multiplier: The noise that both together cost; at most 2 `count_noise`.
        count_noise: The noise on the count, which a unit changes by at most 1/2.

    Returns:
        The noise in units of the clipping norm (Andrew et al., theorem 1).
    """
    if noise_multiplier == 0:
        return 0.0
    return float((noise_multiplier**-2 - (2 * count_noise) ** -2) ** -0.5)
