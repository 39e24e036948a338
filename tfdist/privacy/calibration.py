"""The noise of a private `fit`: the multiplier of the settings, or the least for a target."""

from __future__ import annotations

from dataclasses import replace

from tfdist.errors import ArgumentError
from tfdist.privacy.accounting.dp_sgd import noise_for
from tfdist.privacy.accounting.ledger import Phase
from tfdist.privacy.client_dp import ClientDP
from tfdist.privacy.planning import StepPlan
from tfdist.privacy.schedules import StepSchedule, schedule_of
from tfdist.privacy.settings import DPSGD
from tfdist.privacy.spending import Spending
from tfdist.strategies.session import Session


def find_noise(
    privacy: DPSGD | ClientDP,
    session: Session,
    spending: Spending,
    step_plan: StepPlan,
    phase: Phase,
) -> tuple[float, StepSchedule | None]:
    """Returns the noise of the settings, or calibrates it for the target.

    Args:
        privacy: The settings.
        session: The session, whose workers must have equal noise.
        spending: The steps that were made before.
        step_plan: The plan.
        phase: The phase of the coming steps, without noise.

    Returns:
        The noise multiplier, and the schedule or None. With a schedule the multiplier is its
        least one.

    Raises:
        ArgumentError: No noise is enough, or a schedule cannot be private.
    """
    schedule = schedule_of(privacy, step_plan.steps) if isinstance(privacy, DPSGD) else None
    if privacy.target_epsilon is None:
        if schedule is not None:
            return schedule.least, schedule
        multiplier = privacy.noise_multiplier
        assert multiplier is not None
        assert not callable(multiplier)
        return multiplier, None
    # A training that continues keeps its noise: steps of one phase must be equal.
    if schedule is None:
        noise = spending.earlier_noise(phase)
    else:
        schedule = schedule.scaled(1 / schedule.least)
        noise = spending.earlier_noise(phase, schedule)
    if noise is None:
        noise = _noise_within(privacy, session, spending, step_plan.steps, phase, schedule)
    if schedule is None:
        return noise, None
    schedule = schedule.scaled(noise)
    return schedule.least, schedule


def _noise_within(
    privacy: DPSGD | ClientDP,
    session: Session,
    spending: Spending,
    steps: int,
    phase: Phase,
    schedule: StepSchedule | None,
) -> float:
    """Calibrates the noise, or the factor of a schedule, for the target."""
    assert privacy.target_epsilon is not None
    assert privacy.delta is not None
    steps = max(1, steps)
    noises = {1.0: steps} if schedule is None else schedule.counts(0, steps)
    factor = noise_for(
        [replace(phase, noise_multiplier=noise, steps=n) for noise, n in noises.items()],
        privacy.target_epsilon,
        privacy.delta,
        accountant=privacy.accountant,
        relation=privacy.relation,
        spent=spending.ledger(0),
    )
    strategy = session.strategy
    # A worker that joins an elastic run later would be alone in this collective. Elastic runs
    # compare the noise of all workers instead.
    return factor if strategy.elastic else float(strategy.broadcast_object(factor))


def check_count_noise(count_noise: float, noise: float, others: str, more: str) -> None:
    """Refuses a count, for an adaptive norm, whose noise leaves nothing for the rest.

    Args:
        count_noise: The standard deviation of the noise on the count.
        noise: The noise multiplier of both together.
        others: What else is released.
        more: What makes the default of `count_noise` larger.

    Raises:
        ArgumentError: The count alone costs as much as both may cost together.
    """
    if noise > 0 and 2 * count_noise <= noise:
        raise ArgumentError(
            f"`count_noise` must be above noise_multiplier / 2: {others} need the rest of the "
            f"budget. Received: count_noise={count_noise:g}, noise_multiplier={noise:g}. Pass "
            f"a larger `count_noise`, or {more}."
        )
