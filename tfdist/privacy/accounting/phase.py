"""Private steps with the same settings, and their description for an accountant."""

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

EXAMPLE, USER, CLIENT = "example", "user", "client"


@dataclass(frozen=True)
class Phase:
    """Steps of DP-SGD made with the same settings.

    Each step draws every example independently with `sampling_probability` (Poisson sampling),
    and clips its gradient. The sum of the clipped gradients gets Gaussian noise with a standard
    deviation of `noise_multiplier` times the clipping norm (Abadi et al., "Deep learning with
    differential privacy", CCS 2016, algorithm 1).

    Args:
        sampling_probability: From 0 to 1: the expected batch size over the number of examples.
        noise_multiplier: At least 0. Without noise nothing is private.
        steps: The number of steps, at least 0.
        capacity: The most examples of a step, or None if there is no limit. If more are drawn,
            a random choice of `capacity` of them stays.
        num_rows: The number of examples in the data. Required with `capacity`.
        unit: "example", "user" or "client". With "user", users are drawn instead of examples,
            and the gradients of a user's examples are summed before they are clipped. With
            "client", a step is a round of federated averaging: clients are drawn, and each
            client's update of the weights is clipped; see `tfdist.ClientDP`.
        bands: For correlated noise, as in `tfdist.DPFTRL`: the number of steps whose noise a
            step combines. All examples then take part in turn, and `sampling_probability` must
            be 1, unless `cyclic`. Such phases do not join: each is a separate mechanism.
        separation: With `bands`, the least number of steps between two steps in which an
            example takes part. None if it takes part once.
        cyclic: With `bands`, whether examples are split into `bands` groups that take turns. A
            step then draws each example of its group with `sampling_probability`. It is the
            `bands` of `tfdist.DPSGD`.
        at_most: Whether `sampling_probability` is the largest of several. Some examples are
            drawn less often then. The cost is computed as if all had the largest one.
        after: With `bands`, the number of steps that another process made before these steps,
            which subtract a part of its noise.
        part: The number of the client whose examples these steps used, if each client of
            federated training makes steps of its own, with noise of its own. None if the steps
            used all examples.
        run_id: A random text that names the process and the `fit` of these steps. See `Ledger`.
        continues: With `after`, the `run_id` of the steps just before these.
        groups: With users, clients and parts, a random text that names the grouping.
            Steps with different groupings do not compose.
        secret: Whether the random numbers came from the operating system. Otherwise there is no
            guarantee.

    Comparisons of phases ignore the last four arguments.

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
    part: int | None = None
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
        check_choice("unit", self.unit, (EXAMPLE, USER, CLIENT))
        check_number("sampling_probability", self.sampling_probability, 0, 1)
        check_number("noise_multiplier", self.noise_multiplier, 0)
        check_count("steps", self.steps, 0)
        check_count("after", self.after, 0)
        if self.capacity is not None and self.num_rows is None:
            raise ArgumentError(
                "`num_rows` must be given with `capacity`: the cost of leaving examples out "
                f"depends on it. Received: capacity={self.capacity!r}, num_rows=None. Pass the "
                "number of examples in the data."
            )
        for name, least in (("capacity", 1), ("num_rows", 1), ("part", 0)):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), least)
        if self.part is not None and self.unit != EXAMPLE:
            raise ArgumentError(
                "`part` must be None for users and clients: only examples are protected by "
                f"each client alone. Received: part={self.part!r}, unit={self.unit!r}."
            )

    def _check_correlated(self) -> None:
        for name in ("bands", "separation"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), 1)
        if self.cyclic and (self.bands is None or self.separation or self.after):
            raise ArgumentError(
                "`cyclic` must be given with `bands`, and without `separation` and `after`. "
                f"Received: bands={self.bands!r}, separation={self.separation!r}, "
                f"after={self.after!r}. Pass `bands` alone."
            )
        if self.in_turn and self.sampling_probability != 1:
            raise ArgumentError(
                "`sampling_probability` must be 1 with `bands`: all examples take part in "
                "turn, and none is drawn. Received: "
                f"sampling_probability={self.sampling_probability!r}. Pass 1, or cyclic=True."
            )

    @property
    def truncates(self) -> bool:
        """Whether a step may draw more examples than the capacity."""
        return (
            self.capacity is not None
            and self.num_rows is not None
            and self.capacity < self.num_rows
        )

    @property
    def in_turn(self) -> bool:
        """Whether noise is correlated and all examples take part in turn."""
        return self.bands is not None and not self.cyclic

    @property
    def independent(self) -> tuple[float, int]:
        """The noise and the number of the equivalent Poisson sampled Gaussian mechanisms.

        There are as many as steps or, with `cyclic`, as many as steps of a group: the columns
        of an example's steps have no row in common, so each of these steps depends on one coin
        alone, given the past (Choquette-Choo et al., "(Amplified) banded matrix factorization",
        NeurIPS 2023, theorem 4).
        """
        if not self.cyclic:
            return self.noise_multiplier, self.steps
        assert self.bands is not None
        return self.noise_multiplier / banded_norm(self.bands), -(-self.steps // self.bands)

    @property
    def gaussian_square(self) -> float:
        """The square of sensitivity over noise, which adds up over Gaussian mechanisms.

        It is 0 if examples are sampled: the steps are not a Gaussian mechanism then.
        """
        if self.in_turn:
            assert self.bands is not None
            norm = sensitivity(self.bands, self.separation, self.steps, self.after)
            return (norm / self.noise_multiplier) ** 2
        # A mixture over draws, or a sum with a capacity, is not a Gaussian.
        if self.sampling_probability < 1 or self.truncates:
            return 0.0
        noise, times = self.independent
        return times / noise**2

    def event(self, *, truncated: bool = True) -> Any:
        """Returns dp-accounting's description of these steps.

        Args:
            truncated: Whether the capacity is taken into account.
        """
        dp = dp_accounting()
        noise, times = self.independent
        if self.in_turn:
            assert self.bands is not None
            # All steps together are one Gaussian mechanism.
            norm = sensitivity(self.bands, self.separation, self.steps, self.after)
            return dp.GaussianDpEvent(self.noise_multiplier / norm)
        if truncated and self.truncates:
            # The cost is proven in Ganesh et al., arXiv 2508.15089.
            step = dp.TruncatedSubsampledGaussianDpEvent(
                self.num_rows,
                self.sampling_probability,
                self.capacity,
                noise,
            )
        else:
            gaussian = dp.GaussianDpEvent(noise)
            step = dp.PoissonSampledDpEvent(self.sampling_probability, gaussian)
        return dp.SelfComposedDpEvent(step, times)


def dp_accounting() -> Any:
    """Imports Google's accountant.

    Raises:
        MissingPackageError: It is not installed.
    """
    try:
        import dp_accounting as module
    except ImportError as error:
        raise MissingPackageError(
            "Privacy accounting must have the package dp-accounting. Received: "
            f'{error}. Install it: pip install "tfdist[privacy]"'
        ) from None
    return module
