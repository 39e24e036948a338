"""Steps of private training that were made with the same settings, and what they are to an
accountant.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tfdist.errors import ArgumentError, MissingPackageError
from tfdist.privacy.accounting.arguments import (
    check_choice,
    check_count,
    check_number,
    check_type,
)
from tfdist.privacy.accounting.correlated import banded_norm, sensitivity

EXAMPLE, USER = "example", "user"


@dataclass(frozen=True)
class Phase:
    """Steps of DP-SGD made with the same settings.

    In each of them every example is drawn independently with `sampling_probability`
    (Poisson sampling), gradients are clipped one by one, and their sum gets Gaussian noise
    of standard deviation `noise_multiplier` times the norm they were clipped to (Abadi et
    al., "Deep learning with differential privacy", CCS 2016, algorithm 1).

    Args:
        sampling_probability: From 0 to 1: the expected batch size over the examples.
        noise_multiplier: At least 0; without noise nothing is private.
        steps: How many steps, at least 0.
        capacity: The most examples a step takes, or None if there is no limit. When more
            were drawn, a random choice of `capacity` of them stays.
        num_rows: Examples in the data; needed with `capacity`.
        unit: "example", or "user": then a user takes an example's place in all of this, and
            the gradients of a user's examples are added up before they are clipped.
        bands: For correlated noise, `tfdist.DPFTRL`: of how many steps it is; then all
            examples take part in turn, and `sampling_probability` must be 1, unless `cyclic`.
            Such phases do not join: each is a mechanism of its own.
        separation: With `bands`, the steps from one that an example takes part in to the
            next, at least; None if it takes part once.
        cyclic: With `bands`, whether each example is in one of so many groups, which take
            turns: in a step of its group it is drawn with `sampling_probability`
            (`tfdist.DPSGD(bands=)`).
        at_most: Whether `sampling_probability` is the largest of several: examples are drawn
            independently, but some less often than others. It costs as if all had it.
        after: With `bands`, how many steps another process had made before these: they take a
            part of its noise back.
        run_id: Which process made these steps in which `fit`, random text. `Ledger` says what
            follows from it.
        continues: With `after`, the `run_id` of the steps just before these.
        groups: With users, which grouping of the examples they were, random text. Different
            groupings do not compose.
        secret: Whether its random numbers came from the operating system; else there is no
            guarantee.

    The last four make no phase another one: phases are compared without them.

    Raises:
        ArgumentError: A value is out of its range.

    Example:
        >>> Phase(sampling_probability=256 / 60000, noise_multiplier=1.1, steps=14100).steps
        14100
    """

    sampling_probability: float
    noise_multiplier: float
    steps: int
    capacity: int | None = None
    num_rows: int | None = None
    unit: str = EXAMPLE
    bands: int | None = None
    separation: int | None = None
    at_most: bool = False
    after: int = 0
    cyclic: bool = False
    run_id: str = field(default="", compare=False, repr=False)
    groups: str | None = field(default=None, compare=False, repr=False)
    continues: str = field(default="", compare=False, repr=False)
    secret: bool = field(default=True, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("at_most", "cyclic", "secret"):
            check_type(name, getattr(self, name), bool, "True or False")
        for name in ("run_id", "continues"):
            check_type(name, getattr(self, name), str, "a text")
        check_type("groups", self.groups, (str, type(None)), "a text or None")
        self._check_correlated()
        check_choice("unit", self.unit, (EXAMPLE, USER))
        check_number("sampling_probability", self.sampling_probability, 0, 1)
        check_number("noise_multiplier", self.noise_multiplier, 0)
        check_count("steps", self.steps, 0)
        check_count("after", self.after, 0)
        if self.capacity is not None and self.num_rows is None:
            raise ArgumentError(
                "`num_rows` must come with `capacity`: the cost of leaving examples out "
                f"depends on it. Received: capacity={self.capacity!r}, num_rows=None."
            )
        for name in ("capacity", "num_rows"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), 1)

    def _check_correlated(self) -> None:
        for name in ("bands", "separation"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), 1)
        if self.cyclic and (self.bands is None or self.separation or self.after):
            raise ArgumentError(
                "`cyclic` must come with `bands`, and without `separation` and `after`. "
                f"Received: bands={self.bands!r}, separation={self.separation!r}, "
                f"after={self.after!r}."
            )
        if self.in_turn and self.sampling_probability != 1:
            raise ArgumentError(
                "`sampling_probability` must be 1 with `bands`: nothing is sampled. Received: "
                f"sampling_probability={self.sampling_probability!r}."
            )

    @property
    def truncates(self) -> bool:
        """Whether more examples may be drawn than the capacity takes."""
        return (
            self.capacity is not None
            and self.num_rows is not None
            and self.capacity < self.num_rows
        )

    @property
    def in_turn(self) -> bool:
        """Whether noise is correlated, and nothing is sampled."""
        return self.bands is not None and not self.cyclic

    @property
    def independent(self) -> tuple[float, int]:
        """The noise and the number of Poisson sampled Gaussian mechanisms that these are.

        As many as there are steps, and of `cyclic` ones as many as a group has: an example's
        columns have no row in common, so given the past each step depends on one coin alone
        (Choquette-Choo et al., "(Amplified) banded matrix factorization", NeurIPS 2023,
        theorem 4).
        """
        if not self.cyclic:
            return self.noise_multiplier, self.steps
        assert self.bands is not None
        return self.noise_multiplier / banded_norm(self.bands), -(-self.steps // self.bands)

    @property
    def gaussian_square(self) -> float:
        """What these steps add to the square of a Gaussian mechanism's mean over deviation.

        0 where examples are sampled, which makes them no Gaussian mechanism.
        """
        if self.in_turn:
            assert self.bands is not None
            moved = sensitivity(self.bands, self.separation, self.steps, self.after)
            return (moved / self.noise_multiplier) ** 2
        if self.sampling_probability < 1 or self.truncates:
            return 0.0
        noise, times = self.independent
        return times / noise**2

    def event(self, *, truncated: bool = True) -> Any:
        """Gives dp-accounting's description of these steps.

        Args:
            truncated: Whether the capacity counts.
        """
        dp = dp_accounting()
        noise, times = self.independent
        if self.in_turn:
            assert self.bands is not None
            once = sensitivity(self.bands, self.separation, self.steps, self.after)
            return dp.GaussianDpEvent(self.noise_multiplier / once)
        if truncated and self.truncates:
            # The cost is proven in Ganesh et al., arXiv 2508.15089.
            one = dp.TruncatedSubsampledGaussianDpEvent(
                self.num_rows,
                self.sampling_probability,
                self.capacity,
                noise,
            )
        else:
            gaussian = dp.GaussianDpEvent(noise)
            one = dp.PoissonSampledDpEvent(self.sampling_probability, gaussian)
        return dp.SelfComposedDpEvent(one, times)


def dp_accounting() -> Any:
    """Imports Google's accountant.

    Raises:
        MissingPackageError: It is not installed.
    """
    try:
        import dp_accounting as found
    except ImportError as error:
        raise MissingPackageError(
            "Privacy accounting must have the package dp-accounting. Received: "
            f'{error}. Install it with: pip install "tfdist[privacy]"'
        ) from None
    return found
