"""The settings of private training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from tfdist.errors import ArgumentError
from tfdist.federated.protection import ExampleProtection
from tfdist.privacy.accounting.arguments import check_choice, check_count, check_number
from tfdist.privacy.accounting.ledger import ACCOUNTANTS, RELATIONS, Ledger

LEAST_NORM, LARGEST_NORM = 1e-10, 1e15
"""The range of clipping norms. Squares of gradients underflow below and overflow above."""


class Guarantee(Protocol):
    """The settings of a guarantee that those of examples and of clients share."""

    @property
    def l2_norm_clip(self) -> Any:
        """The norm, or a schedule of it."""

    @property
    def noise_multiplier(self) -> Any:
        """The noise, a schedule of it, or None."""

    @property
    def target_epsilon(self) -> float | None:
        """The largest epsilon, or None."""

    @property
    def delta(self) -> float | None:
        """The probability with which the guarantee may fail."""

    @property
    def accountant(self) -> str:
        """The accountant."""

    @property
    def relation(self) -> str:
        """The neighbouring relation."""

    @property
    def seed(self) -> int | None:
        """The seed of tests, or None."""


def check_guarantee(settings: Guarantee, unit: str, takes_schedules: bool) -> None:
    """Checks what all private trainings are given.

    Args:
        settings: The settings.
        unit: What is protected, in the plural.
        takes_schedules: Whether the norm and the noise may be functions of the step.

    Raises:
        ArgumentError: A value is out of its range, or not exactly one of `noise_multiplier`
            and `target_epsilon` was given.
    """
    noise, target = settings.noise_multiplier, settings.target_epsilon
    if not (takes_schedules and callable(settings.l2_norm_clip)):
        check_number("l2_norm_clip", settings.l2_norm_clip, LEAST_NORM, LARGEST_NORM)
    is_schedule = takes_schedules and callable(noise)
    is_scaled = is_schedule and target is not None
    if not is_scaled and (noise is None) == (target is None):
        raise ArgumentError(
            "Exactly one of `noise_multiplier` and `target_epsilon` must be given. "
            f"Received: noise_multiplier={noise!r}, target_epsilon={target!r}. With "
            "`target_epsilon`, tfdist chooses the noise."
        )
    if noise is not None and not is_schedule:
        check_number("noise_multiplier", noise, 0)
    if target is not None:
        check_number("target_epsilon", target, 0)
    if settings.delta is None:
        raise ArgumentError(
            "`delta` must be given: it is the probability with which the guarantee may fail. "
            f"Received: delta=None. Choose one far below 1 / the number of {unit}."
        )
    check_number("delta", settings.delta, 0, 1, open_ends=True)
    check_choice("accountant", settings.accountant, ACCOUNTANTS)
    check_choice("relation", settings.relation, RELATIONS)
    if settings.seed is not None:
        check_count("seed", settings.seed, 0)


def check_adaptive(
    target_quantile: float | None, clip_learning_rate: float, count_noise: float | None
) -> None:
    """Checks the settings of a clipping norm that follows a quantile, if there is one.

    Args:
        target_quantile: As in `DPSGD`.
        clip_learning_rate: As in `DPSGD`.
        count_noise: As in `DPSGD`.

    Raises:
        ArgumentError: A value is out of its range.
    """
    if target_quantile is None:
        return
    check_number("target_quantile", target_quantile, 0, 1, open_ends=True)
    check_number("clip_learning_rate", clip_learning_rate, 0)
    if count_noise is not None:
        check_number("count_noise", count_noise, 0)


@dataclass(frozen=True)
class DPSGD(ExampleProtection):
    """Differentially private training, for `fit(..., privacy=DPSGD(...))`.

    Each step draws every example independently with probability `batch_size` / examples. Each
    example's gradient is clipped to a norm. The clipped gradients are summed over all replicas,
    Gaussian noise is added to the sum, and the result is divided by the expected size of a
    batch (Abadi et al., "Deep learning with differential privacy", CCS 2016, algorithm 1). The
    optimizer gets nothing else from the data. Pass either `noise_multiplier` or
    `target_epsilon`, or both if `noise_multiplier` is a schedule.

    In federated training, `FedAvg(privacy=DPSGD(...))`, each local step of a client is such a
    step on the client's own examples, with all noise of its own. Epsilon is then the largest of
    the clients'. There, schedules, `target_quantile`, `group_ids`, `augmentations` and `bands`
    cannot be used.

    A schedule is a function of the step's number, counted from 0 in each `fit`, such as a
    `keras.optimizers.schedules.LearningRateSchedule`. It is evaluated for all steps before the
    first one, and must depend on nothing else. A training that continues from a checkpoint
    continues the schedule.

    Args:
        l2_norm_clip: The norm, over all variables, to which each example's gradient is
            clipped; between 1e-10 and 1e15. A schedule does not change epsilon, since noise is
            in units of each step's norm.
        noise_multiplier: The noise's standard deviation on the sum over all replicas, in
            units of `l2_norm_clip`. 0 adds no noise, and then nothing is private. A schedule
            must be above 0. If it takes more than 32 values, it is rounded down to 32 values.
        target_epsilon: The largest epsilon of all steps on these data, with those in `spent`
            and those of earlier `fit`s of the model. The noise is calibrated for it. With a
            schedule, the factor of the schedule is calibrated.
        delta: Between 0 and 1, far below 1 / the number of examples.
        accountant: "pld" or "rdp", as in `tfdist.privacy.epsilon`.
        relation: The neighbouring relation, as in `tfdist.privacy.epsilon`.
        microbatch_size: The number of examples that a replica computes at once, if a batch does
            not fit into memory. None is all. It changes only time and memory.
        spent: Steps that were made on the same data before, for example by another process.
            Steps of earlier `fit`s of the same model in this process are counted anyway.
        clipping: "flat" clips over all variables. "per_layer" clips each of L layers with
            weights to `l2_norm_clip` / sqrt(L). It costs the same, and a layer with large
            gradients does not scale the others down (McMahan et al., "Learning differentially
            private recurrent language models", ICLR 2018, section 2).
        target_quantile: The fraction of examples whose gradients shall not be clipped, between
            0 and 1. The norm then starts at `l2_norm_clip`, and a noisy count of examples
            within the norm moves it (Andrew et al., "Differentially private learning with
            adaptive clipping", NeurIPS 2021). The noise of both is chosen so that together
            they cost as much as `noise_multiplier`. None keeps the norm fixed.
        clip_learning_rate: The learning rate of the norm's logarithm, above 0.
        count_noise: The standard deviation of the noise on that count. None is a twentieth of
            the expected batch.
        group_ids: The number or name of each example's user, shape [examples]. Users are then
            protected instead of examples: a step draws each user with all of its examples, and
            their gradients are summed and clipped together (McMahan et al., 2018, section 2). A
            step has `batch_size` examples on average.
        max_rows_per_group: The most examples of a user in a step. If a user has more, a random
            choice is taken. None is no limit.
        augmentations: How many random changes `augment` of `fit` makes of each drawn example.
            The mean of their gradients is clipped, so they cost only time (De et al.,
            "Unlocking high-accuracy differentially private image classification through
            scale", 2022, section 3.2).
        bands: The number of bands of the matrix of correlated noise: later steps subtract a
            part of earlier noise. Examples are then split into `bands` random groups that take
            turns, and a step draws each example of its group with `bands` times the
            probability, at most 1 (Choquette-Choo et al., "(Amplified) banded matrix
            factorization for differentially private learning", NeurIPS 2023). Training keeps
            `bands` vectors of the size of the weights. None and 1 give independent noise. It
            needs a `noise_multiplier` and an `l2_norm_clip` that are numbers, and cannot be
            combined with `group_ids` and `target_quantile`.
        seed: The seed of the noise, and of the sampling unless `fit` has a `seed`. It is for
            tests: a training with a known seed is not private, and the report says so. None
            draws from the operating system.

    Raises:
        ArgumentError: A value is out of its range, or not exactly one of `noise_multiplier`
            and `target_epsilon` was given.

    Example:
        >>> import keras, numpy as np, tfdist
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        >>> model.compile(optimizer="sgd", loss="mse")
        >>> x, y = np.ones((100, 4), "float32"), np.ones((100, 1), "float32")
        >>> privacy = tfdist.DPSGD(l2_norm_clip=1.0, noise_multiplier=2.0, delta=1e-3)
        >>> history = tfdist.fit(model, x, y, batch_size=10, verbose=0, privacy=privacy)
        >>> history.privacy.ledger.steps, round(history.privacy.epsilon, 1)
        (10, 0.4)
    """

    samples: ClassVar[bool] = True  # False if all examples take part in turn

    l2_norm_clip: float | Callable[[int], Any]
    noise_multiplier: float | Callable[[int], Any] | None = None
    target_epsilon: float | None = None
    delta: float | None = None
    accountant: str = "pld"
    relation: str = "add_or_remove_one"
    microbatch_size: int | None = None
    spent: Ledger = field(default_factory=Ledger)
    clipping: str = "flat"
    target_quantile: float | None = None
    clip_learning_rate: float = 0.2
    count_noise: float | None = None
    group_ids: Any = field(default=None, compare=False, repr=False)
    max_rows_per_group: int | None = None
    augmentations: int = 1
    bands: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        check_guarantee(self, "examples", takes_schedules=True)
        check_choice("clipping", self.clipping, ("flat", "per_layer"))
        self._check_adaptive()
        if self.microbatch_size is not None:
            check_count("microbatch_size", self.microbatch_size, 1)
        if self.max_rows_per_group is not None:
            check_count("max_rows_per_group", self.max_rows_per_group, 1)
            if self.group_ids is None:
                raise ArgumentError(
                    "`max_rows_per_group` must be given with `group_ids`. Received: "
                    f"max_rows_per_group={self.max_rows_per_group!r} and group_ids=None. Pass "
                    "`group_ids`, or leave it out."
                )
        check_count("augmentations", self.augmentations, 1)
        if self.samples and self.bands is not None:
            self._check_cyclic()

    @property
    def is_scheduled(self) -> bool:
        """Whether steps differ in their noise or norm."""
        return callable(self.noise_multiplier) or callable(self.l2_norm_clip)

    def _check_cyclic(self) -> None:
        check_count("bands", self.bands, 1)
        if self.is_scheduled:
            raise ArgumentError(
                "`noise_multiplier` and `l2_norm_clip` must be numbers with `bands`: later "
                "steps subtract noise, so it must have the same size in all steps. Received: a "
                f"schedule, and bands={self.bands!r}. Leave one of them out."
            )
        for name, reason in (
            ("group_ids", "correlated noise protects single examples"),
            ("target_quantile", "later steps subtract noise, which must be of the same norm"),
        ):
            if (value := getattr(self, name)) is not None:
                raise ArgumentError(
                    f"`{name}` must be None with `bands`: {reason}. Received: {name} of type "
                    f"{type(value).__name__}, and bands={self.bands!r}. Leave one of them out."
                )

    def _check_adaptive(self) -> None:
        check_adaptive(self.target_quantile, self.clip_learning_rate, self.count_noise)
        if self.target_quantile is None:
            return
        if self.is_scheduled:
            raise ArgumentError(
                "`target_quantile` must be None with a schedule: it moves the norm itself, and "
                "takes a part of each step's budget. Received: "
                f"target_quantile={self.target_quantile!r} and a schedule. Leave one of them "
                "out."
            )
        if self.clipping == "per_layer":
            raise ArgumentError(
                "`target_quantile` must be None with clipping='per_layer': it follows the norm "
                f"over all variables. Received: target_quantile={self.target_quantile!r} and "
                "clipping='per_layer'. Leave one of them out."
            )
