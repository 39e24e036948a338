"""How much noise a private `fit` adds: what was asked for, or what a target leaves room for."""

from __future__ import annotations

from dataclasses import replace

from tfdist.privacy.accounting.dp_sgd import noise_for
from tfdist.privacy.accounting.ledger import Phase
from tfdist.privacy.planning import Plan
from tfdist.privacy.schedules import StepSchedule, schedule_of
from tfdist.privacy.settings import DPSGD
from tfdist.privacy.spending import Spending
from tfdist.strategies.session import Session


def find_noise(
    privacy: DPSGD, session: Session, spending: Spending, planned: Plan, phase: Phase
) -> tuple[float, StepSchedule | None]:
    """Finds the noise, for the target if it was not given.

    Args:
        privacy: The settings.
        session: Whose workers are to have the same.
        spending: Knows what was spent before.
        planned: What is planned.
        phase: As its steps will be counted, without noise.

    Returns:
        The multiplier, the least one of a schedule, and what each step gets if they differ.

    Raises:
        ArgumentError: No noise is enough, or a schedule cannot be private.
    """
    schedule = schedule_of(privacy, planned.steps)
    if privacy.target_epsilon is None:
        if schedule is not None:
            return schedule.least, schedule
        given = privacy.noise_multiplier
        assert given is not None
        assert not callable(given)
        return given, None
    if schedule is None:
        found = spending.noise_then(phase)
    else:
        schedule = schedule.scaled(1 / schedule.least)
        found = spending.noise_then(phase, schedule)
    if found is None:
        found = _noise_within(privacy, session, spending, planned.steps, phase, schedule)
    if schedule is None:
        return found, None
    schedule = schedule.scaled(found)
    return schedule.least, schedule


def _noise_within(
    privacy: DPSGD,
    session: Session,
    spending: Spending,
    steps: int,
    phase: Phase,
    schedule: StepSchedule | None,
) -> float:
    """Finds the noise, or what a schedule is to be multiplied by, for the target."""
    assert privacy.target_epsilon is not None
    assert privacy.delta is not None
    steps = max(1, steps)
    noises = {1.0: steps} if schedule is None else schedule.counts(0, steps)
    found = noise_for(
        [replace(phase, noise_multiplier=noise, steps=n) for noise, n in noises.items()],
        privacy.target_epsilon,
        privacy.delta,
        accountant=privacy.accountant,
        relation=privacy.relation,
        spent=spending.ledger(0),
    )
    strategy = session.strategy
    # Who joins an elastic run later would be alone with this; there it is compared.
    return found if strategy.elastic else float(strategy.broadcast_object(found))
