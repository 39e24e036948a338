"""What a private training has spent, together with all that was spent on its weights before."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import secrets
from collections import Counter
from collections.abc import Iterator
from typing import Any

from tfdist.errors import ArgumentError, CheckpointError
from tfdist.privacy import memory
from tfdist.privacy.course import Course
from tfdist.privacy.journal import Journal, backup_of, steps_ahead
from tfdist.privacy.ledger import Ledger, Phase
from tfdist.privacy.memory import History
from tfdist.privacy.schedules import StepSchedule
from tfdist.privacy.settings import DPSGD
from tfdist.session import Session

_GROUPINGS: dict[str, str] = {}  # names of those that this process has seen


class Spending:
    """Keeps the books of one private `fit`.

    Args:
        privacy: The settings.
        session: Where the replicas are.
        model: A compiled `keras.Model`.
        course: Counts the steps.
        callbacks: What `fit` was given.
        secret: Whether all random numbers come from the operating system. What has a known
            seed comes out the same again: nothing of it is lost in a crash.

    Attributes:
        before: What was spent before this training, and beside it.
        limit: What all steps may cost, if the training may have to end before it is over.
    """

    def __init__(
        self,
        privacy: DPSGD,
        session: Session,
        model: Any,
        course: Course,
        callbacks: Any,
        *,
        secret: bool,
    ) -> None:
        self.before = _known(memory.of(model)).merged(History(privacy.spent))
        self.before = dataclasses.replace(self.before, secret=self.before.secret and secret)
        self.limit: float | None = None
        self._privacy, self._session, self._model = privacy, session, model
        self._course = course
        self._is_secret = secret
        self._run_id = secrets.token_hex(8) if secret else ""
        self._phase: Phase | None = None
        self._schedule: StepSchedule | None = None
        self._kept: Counter[float] = Counter()  # steps of earlier processes, by their noise
        self._planned = self._ahead = 0
        self._broken_off: list[Phase] = []
        self._in_backup = self._counted_at_first = 0
        self._journal: Journal | None = None
        directory = backup_of(callbacks)
        if directory is not None and secret and not session.strategy.elastic:
            self._journal = Journal(directory)

    def named(self, phase: Phase, users: str | None) -> Phase:
        """Gives a phase the names of this training and of its grouping of examples.

        A name is random: what a file or a ledger says must not depend on who is in the data.

        Args:
            phase: Of this training.
            users: The fingerprint of the grouping, if there is one.
        """
        groups = None
        if users is not None:
            groups = _GROUPINGS.setdefault(users, secrets.token_hex(8))
        return dataclasses.replace(phase, run_id=self._run_id, groups=groups)

    def plan(self, phase: Phase, steps: int, schedule: StepSchedule | None) -> None:
        """Takes what will be made.

        Args:
            phase: As its steps will be counted.
            steps: How many are planned.
            schedule: Of their noise, if it is not that of `phase`.
        """
        self._phase, self._planned, self._schedule = phase, steps, schedule

    def go_on(
        self, saved: dict[str, Any] | None = None, kept: int = 0, directory: Any = None
    ) -> dict[str, Any]:
        """Takes what earlier processes knew of the model, and of this `fit`.

        Args:
            saved: What one of them got from this method; None if there is none.
            kept: Steps of this `fit` that are in the weights it has saved.
            directory: Where it was saved, if it is a `Checkpoint`.

        Returns:
            What is to be saved, plain data.

        Raises:
            ArgumentError: `spent` is not what it was.
            CheckpointError: How many steps were made is not known.
        """
        if directory is not None:
            self._journal = Journal(directory) if self._is_secret else None
        found = None if self._journal is None else self._journal.read()
        strategy = self._session.strategy
        if self._journal is not None or saved is not None:
            found, self._run_id = strategy.broadcast_object((found, self._run_id))
        if saved is not None:
            if "run" not in saved:
                raise CheckpointError(
                    "A checkpoint of private training must be of this version of tfdist. "
                    "Received: one of an older version. Begin anew in another directory, and "
                    "pass what was spent as DPSGD(spent=...)."
                )
            self._go_on_with(saved, kept, found)
        elif found is not None:
            self.before = self.before.merged(_known(found[1]))
            self._broken_off = [p for p in found[1].ledger.phases if p.run_id == found[0]]
            self._in_backup = sum(phase.steps for phase in self._broken_off)
        else:
            self._note_changes()
        bands = self._privacy.bands or 1
        noise = self._course.go_on(None if saved is None else saved["noise"], kept, bands)
        return {
            "noise": noise if self._course.correlated else None,
            "history": self.before.to_dict(),
            "spent": self._privacy.spent.to_dict(),
            "run": self._run_id,
        }

    def _go_on_with(
        self, saved: dict[str, Any], kept: int, found: tuple[str, History] | None
    ) -> None:
        """Takes what a checkpoint knows, and what was made since it was written."""
        spent = Ledger.from_dict(saved["spent"])
        fresh = self._run_id
        if self._privacy.spent.phases and self._privacy.spent.merged(spent).steps != (
            self._privacy.spent.steps
        ):
            raise ArgumentError(
                "`spent` must hold what it held when this training began, or be left out: the "
                f"checkpoint has it. Received: {self._privacy.spent.steps} steps, and "
                f"{spent.steps} in the checkpoint."
            )
        self._run_id = saved["run"]
        self._course.kept = kept
        history = History.from_dict(saved["history"])
        known = history.merged(History(spent)).merged(History(self._privacy.spent))
        known = known.merged(memory.of(self._model))
        self.before = _known(known.without(self._run_id) if self._is_secret else known)
        secret = history.secret and self._is_secret
        self.before = dataclasses.replace(self.before, secret=secret)
        if not self._is_secret:
            return
        if found is None:
            raise CheckpointError(
                "The file that counts private steps must lie beside the checkpoints: some may "
                "have been made after the last one. Received: none. Put it back, or begin anew "
                "in another directory, and pass what was spent as DPSGD(spent=...)."
            )
        written = known.merged(found[1])
        own = [p for p in written.ledger.phases if p.run_id in (saved["run"], found[0])]
        if self._is_cyclic:  # what this process makes is a mechanism of its own
            self.before = dataclasses.replace(_known(written), secret=secret)
            self._broken_off, self._run_id, self._course.kept = own, fresh, 0
            return
        own = [p for p in own if p.run_id == self._run_id]
        made = sum(phase.steps for phase in own)
        for phase in own:
            self._kept[phase.noise_multiplier] += phase.steps
        self.before = self.before.merged(_known(found[1].without(self._run_id)))
        lost = max(0, made - kept)
        if not lost:
            return
        self._broken_off = own
        if not self._course.correlated:
            self._course.kept = made
            return
        broken = dataclasses.replace(
            own[-1], steps=lost, after=kept, run_id=secrets.token_hex(8)
        )
        ledger = self.before.ledger.add(broken)
        self.before = dataclasses.replace(self.before, ledger=ledger)

    @property
    def _is_cyclic(self) -> bool:
        return self._privacy.samples and self._privacy.bands is not None

    def _note_changes(self) -> None:
        """Notes what was made of the model that is not counted."""
        known = self.before
        updates, is_changed = memory.changed_since(self._model)
        uncounted = known.uncounted + updates
        if not known.ledger.phases:
            uncounted = max(known.uncounted, self._course.iterations)
        self.before = dataclasses.replace(
            known,
            uncounted=uncounted,
            changes=known.changes + (is_changed and not updates),
        )

    def noise_then(self, phase: Phase) -> float | None:
        """Gives the noise of the training that broke off, if this one goes on with it.

        Steps of it were lost, so fewer are left for a target than were planned: the training
        ends earlier, see `limit`.

        Args:
            phase: One step, without noise.
        """
        for broken in self._broken_off:
            as_now = dataclasses.replace(
                broken, noise_multiplier=phase.noise_multiplier, steps=phase.steps, after=0
            )
            if as_now == phase:
                self.limit = self._privacy.target_epsilon
                return broken.noise_multiplier
        return None

    def factor_then(self, phase: Phase, schedule: StepSchedule) -> float | None:
        """Gives what a schedule was multiplied by in the training that broke off.

        Args:
            phase: As in `noise_then`.
            schedule: What is multiplied.
        """
        broken = [p for p in self._broken_off if p.steps]
        if not broken:
            return None
        levels = set(schedule.multipliers)
        for level in levels:
            factor = broken[0].noise_multiplier / level
            noises = [factor * other for other in levels]
            if all(_is_of(p, phase, noises) for p in broken):
                self.limit = self._privacy.target_epsilon
                return factor
        return None

    def ledger(self, steps: int) -> Ledger:
        """Gives all private steps on the data.

        Args:
            steps: Of this training.
        """
        found = self.before.ledger
        for phase in self.phases(steps):
            found = found.add(phase)
        return found

    def phases(self, steps: int) -> list[Phase]:
        """Describes steps of this training, by their noise.

        Earlier processes have made those that are written down, and where nothing is written
        the first ones of the schedule; this one makes those from the step on where it began.

        Args:
            steps: How many.
        """
        if self._phase is None:
            return []
        schedule, kept = self._schedule, self._course.kept
        if self._is_cyclic:
            named = f"{self._run_id}-before" if self._run_id else ""  # another mechanism
            before = dataclasses.replace(self.phase(min(kept, steps)), run_id=named)
            return [before, self.phase(max(0, steps - kept))]
        if schedule is None:
            return [self.phase(steps)]
        if steps < kept:
            counts = Counter(schedule.counts(0, steps))
        else:
            counts, known = self._kept.copy(), self._kept.total()
            counts.update(schedule.counts(known, kept - known))
            counts.update(schedule.counts(self._course.begins_at, steps - kept))
        return [
            dataclasses.replace(self._phase, noise_multiplier=noise, steps=count)
            for noise, count in counts.items()
        ]

    def phase(self, steps: int) -> Phase:
        """Describes steps of this training.

        Args:
            steps: How many.
        """
        assert self._phase is not None
        return dataclasses.replace(self._phase, steps=steps)

    def history(self) -> History:
        """Gives what is in the weights now; see `memory.Run`."""
        return dataclasses.replace(self.before, ledger=self.ledger(self._course.steps_made))

    def absorb(self, history: History) -> None:
        """Takes what a file says whose weights a callback has loaded.

        Args:
            history: Of the file; of this training it may know less.
        """
        own = [p for p in history.ledger.phases if p.run_id == self._run_id]
        if self._is_secret:
            made = sum(phase.steps for phase in own)
            self._course.kept = max(self._course.kept, made - self._course.made_here)
        self.before = self.before.merged(_known(history.without(self._run_id)))

    def before_steps(self, steps: int) -> None:
        """Writes steps down before they are made; see `Listener`.

        Args:
            steps: Of this training.
        """
        if self._journal is None or steps <= self._ahead:
            return
        at_once = int(self._model.steps_per_execution)
        self._ahead = steps - at_once + steps_ahead(self._planned, at_once)
        self._write(self._ahead)

    def _write(self, steps: int) -> None:
        if self._journal is not None and self._session.is_chief:
            history = dataclasses.replace(self.before, ledger=self.ledger(steps))
            self._journal.write(self._run_id, history)

    def begun(self) -> None:
        """Counts what callbacks have restored; see `Listener`."""
        self._agree()
        found = self.before.ledger.steps + self._course.steps_made - self._counted_at_first
        # A backup that says nothing of its steps: they are taken for steps like these.
        self._course.kept += max(0, self._course.moved() - found)
        self._begin_schedule()

    def _begin_schedule(self) -> None:
        """Finds the place in the schedule, the same on all workers; a backup may move it."""
        course, strategy = self._course, self._session.strategy
        place = max(course.kept, course.moved())
        if self._schedule is not None and strategy.place.num_workers > 1:
            place = max(strategy.gather_objects(place))
        course.begin_at(place)

    def _agree(self) -> None:
        """Gives all workers the largest counts: one may have read a file, or come late."""
        strategy = self._session.strategy
        if strategy.place.num_workers == 1:
            return
        course = self._course
        said = strategy.gather_objects(
            (self._run_id, self.before, course.kept, course.made_here)
        )
        self._run_id = said[0][0]
        assert self._phase is not None
        self._phase = dataclasses.replace(self._phase, run_id=self._run_id)
        for _, before, kept, made in said:
            self.before = self.before.merged(before)
            course.kept = max(course.kept, kept)
            course.settle(max(made, course.made_here))

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Wraps the training; what was made counts, however it ends."""
        self._course.look()
        self._counted_at_first = self.before.ledger.steps - self._in_backup
        memory.keep(self._model, self)
        try:
            yield
        finally:
            memory.keep(self._model, self.history())
            # Else it says too much, which is no reason to lose what was trained.
            with contextlib.suppress(CheckpointError):
                if self._journal is not None and self._journal.is_there:
                    self._write(self._course.steps_made)


def _is_of(broken: Phase, phase: Phase, noises: list[float]) -> bool:
    """Tells whether steps that broke off are such as a phase has, with one of some noises."""
    as_now = dataclasses.replace(
        broken, noise_multiplier=phase.noise_multiplier, steps=phase.steps
    )
    is_one = any(math.isclose(broken.noise_multiplier, noise, rel_tol=1e-9) for noise in noises)
    return as_now == phase and is_one


def _known(history: History) -> History:
    """Leaves out names of groupings that only another process could compare."""
    known = set(_GROUPINGS.values())
    phases = tuple(
        dataclasses.replace(p, groups=p.groups if p.groups in known else None)
        for p in history.ledger.phases
    )
    return dataclasses.replace(history, ledger=Ledger(phases))
