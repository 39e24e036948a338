"""The steps after which a checkpoint is due."""

from __future__ import annotations

import datetime

import pytest

from tfdist.resume.checkpoint.schedule import SavingSchedule

pytestmark = pytest.mark.quick


def due_after(every: int, begin: int, executions: int, per_execution: int) -> list[int]:
    """Lists the steps after which a checkpoint is saved at once when it is due."""
    schedule, saved = SavingSchedule(every, begin), []
    for number in range(1, executions + 1):
        steps = begin + number * per_execution
        schedule.note_step(steps)
        if schedule.is_due:
            schedule.note_saved(steps)
            saved.append(steps)
    return saved


def test_an_execution_of_several_steps_may_jump_over_the_multiple() -> None:
    assert due_after(5, 0, 20, 1) == [5, 10, 15, 20]
    assert due_after(5, 0, 6, 4) == [8, 12, 16, 20]  # past 5, 10 and 15, and at 20
    assert due_after(5, 7, 8, 1) == [10, 15]


def test_a_checkpoint_stays_due_until_it_is_saved() -> None:
    schedule = SavingSchedule(3, 0)
    for steps in (3, 4):
        schedule.note_step(steps)
        assert schedule.is_due
    schedule.note_saved(4)
    assert schedule.has_saved(4)
    schedule.note_step(5)
    assert not schedule.is_due
    assert not schedule.has_saved(5)


def test_a_time_may_be_over_or_not() -> None:
    for seconds, is_due in ((0.0, True), (1e6, False)):
        schedule = SavingSchedule(datetime.timedelta(seconds=seconds), 0)
        schedule.note_step(1)
        assert schedule.is_timed
        assert schedule.is_due == is_due
    schedule = SavingSchedule("epoch", 0)
    schedule.note_step(10**6)
    assert schedule.is_each_epoch
    assert not schedule.is_due
