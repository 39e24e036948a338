"""What a private training has spent, together with all that was spent on its weights before."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
from collections.abc import Iterator
from typing import Any

from tfdist.errors import CheckpointError
from tfdist.privacy import groupings, model_history
from tfdist.privacy.accounting.identity import like_steps, same_made_again
from tfdist.privacy.accounting.ledger import Ledger, Phase
from tfdist.privacy.accounting.levels import Levels
from tfdist.privacy.journal import Journal, backup_of, steps_ahead
from tfdist.privacy.model_history import History
from tfdist.privacy.progress import StepProgress
from tfdist.privacy.resumption import Earlier, saved_state, with_phase
from tfdist.privacy.settings import DPSGD
from tfdist.strategies.session import Session

_AGREED: dict[str, str] = {}  # what the first worker calls phases that each made by hand


class Spending:
    """Keeps the books of one private `fit`.

    Args:
        privacy: The settings.
        session: Where the replicas are.
        model: A compiled `keras.Model`.
        progress: Counts the steps.
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
        progress: StepProgress,
        callbacks: Any,
        *,
        secret: bool,
    ) -> None:
        self.limit: float | None = None
        self._privacy, self._session, self._model = privacy, session, model
        self._progress = progress
        self._is_secret = secret
        self._run_id = secrets.token_hex(8)
        self._phase: Phase | None = None
        self._levels: Levels | None = None
        self._planned = self._ahead = 0
        self._earlier = Earlier()
        self._noise: float | None = None
        self._saved: dict[str, Any] = {}
        self._spent = privacy.spent.renamed(_AGREED)
        self.before = self._known_before()
        self._restored = self._counted_at_first = 0
        self._journal: Journal | None = None
        directory = backup_of(callbacks)
        if directory is not None and secret and not session.strategy.elastic:
            self._journal = Journal(directory)

    def _known_before(self) -> History:
        """Puts together what was spent before, with what earlier processes have made."""
        found = self._earlier.history.merged(History(self._earlier.spent))
        found = found.merged(History(self._spent)).merged(model_history.of(self._model))
        return groupings.known(
            dataclasses.replace(found, secret=found.secret and self._is_secret)
        )

    def named(self, phase: Phase, users: str | None) -> Phase:
        """Gives a phase the names of this process's run and of its grouping of examples.

        A name is random: what a file or a ledger says must not depend on who is in the data.

        Args:
            phase: Of this training.
            users: The fingerprint of the grouping, if there is one.
        """
        groups = None
        if users is not None:
            groups = groupings.name_of(users)
        after = self._progress.position if self._progress.correlated else 0
        return dataclasses.replace(
            phase, run_id=self._run_id, groups=groups, after=after,
            continues=self._earlier.newest, secret=self._is_secret,
        )  # fmt: skip

    def plan(self, phase: Phase, steps: int, levels: Levels | None = None) -> None:
        """Takes what will be made.

        Args:
            phase: As its steps will be counted.
            steps: How many are planned, those that a checkpoint has included.
            levels: Of their noise, if it is not that of `phase`.
        """
        self._phase, self._planned, self._levels = phase, steps, levels
        with_phase(self._saved, phase, levels, self._progress.counted_from)
        privacy, target = self._privacy, self._privacy.target_epsilon
        if target is None or self._noise is None:
            return
        assert privacy.delta is not None
        whole = self.ledger(max(0, steps - self._progress.position))
        spent = whole.epsilon(
            privacy.delta, accountant=privacy.accountant, relation=privacy.relation
        )
        self.limit = target if spent > target else None

    def go_on(
        self, saved: dict[str, Any] | None = None, kept: int = 0, directory: Any = None
    ) -> dict[str, Any]:
        """Takes what earlier processes knew of the model, and of this `fit`.

        The steps that this process makes get a name of their own, also if it goes on with
        another one's training: of two that go on from copies of a folder, each makes steps of
        its own.

        Args:
            saved: What one of them got from this method; None if there is none.
            kept: Steps of this `fit` that are in the weights it has saved.
            directory: Where it was saved, if it is a `Checkpoint`.

        Returns:
            What is to be saved, plain data, once `plan` has been called.

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
            self._go_on_with(saved, kept, found)
        elif found is not None:
            self._earlier = found
            names = same_made_again(self._spent.phases, found.spent.phases)
            self._spent = self._spent.renamed(names)
            self.before = self._known_before()
            self._restored = sum(phase.steps for phase in found.phases)
        else:
            self._note_changes()
        bands = self._privacy.bands or 1
        noise = self._progress.go_on(None if saved is None else saved["noise"], kept, bands)
        before = dataclasses.replace(self._earlier, spent=self._spent, history=self.before)
        self._saved = saved_state(before, self._run_id, kept)
        self._saved["noise"] = noise if self._progress.correlated else None
        return self._saved

    def _go_on_with(self, saved: dict[str, Any], kept: int, found: Earlier | None) -> None:
        """Takes what a checkpoint knows, and what was made since it was written."""
        earlier = Earlier.of_checkpoint(saved, kept)
        self._spent = self._spent.renamed(earlier.names_of(self._spent)).merged(earlier.spent)
        self._earlier = earlier.completed(found) if self._is_secret else earlier
        self.before = self._known_before()
        self._restored = kept

    def _note_changes(self) -> None:
        """Notes what was made of the model that is not counted."""
        known = self.before
        updates, is_changed = model_history.changed_since(self._model)
        uncounted = known.uncounted + updates
        if not known.ledger.phases:
            uncounted = max(known.uncounted, self._progress.iterations)
        self.before = dataclasses.replace(
            known,
            uncounted=uncounted,
            changes=known.changes + (is_changed and not updates),
        )

    def noise_then(self, phase: Phase, levels: Levels | None = None) -> float | None:
        """Gives the noise of the training that broke off, if this one goes on with it.

        If steps of it were lost, fewer are left for a target than were planned: the training
        ends earlier, see `limit`.

        Args:
            phase: One step, without noise.
            levels: If noise follows a schedule; then what that was multiplied by is given.
        """
        made = self._earlier.in_order
        if levels is not None:
            self._noise = levels.factor_in(made, phase)
            return self._noise
        for earlier in made:
            noise, steps = phase.noise_multiplier, phase.steps
            as_now = dataclasses.replace(
                earlier, noise_multiplier=noise, steps=steps, after=phase.after
            )
            if as_now == phase:
                self._noise = earlier.noise_multiplier
        return self._noise

    def notice(self) -> str | None:
        """Says that `spent` may hold what is known already."""
        return like_steps(self._spent.phases, self.before.ledger.phases)

    def ledger(self, steps: int) -> Ledger:
        """Gives all private steps on the data.

        Args:
            steps: Of this training.
        """
        found = self.before.ledger
        for phase in self._phases(steps):
            found = found.add(phase)
        return found

    def _phases(self, steps: int) -> list[Phase]:
        """Describes steps of this training, by their noise."""
        if self._phase is None:
            return []
        progress = self._progress
        if self._levels is not None:
            return self._levels.phases(self._phase, progress.counted_from, steps)
        if not self._phase.cyclic:
            return [self.phase(steps)]
        # What a backup has that says nothing of its steps was another mechanism.
        unknown = min(progress.kept, steps)
        named = dataclasses.replace(self.phase(unknown), run_id=f"{self._run_id}-before")
        return [named, self.phase(steps - unknown)]

    def phase(self, steps: int) -> Phase:
        """Describes steps of this training.

        Args:
            steps: How many.
        """
        assert self._phase is not None
        return dataclasses.replace(self._phase, steps=steps)

    def history(self) -> History:
        """Gives what is in the weights now; see `model_history.RunUnderWay`."""
        return dataclasses.replace(self.before, ledger=self.ledger(self._progress.steps_made))

    def absorb(self, history: History) -> None:
        """Takes what a file says whose weights a callback has loaded.

        Args:
            history: Of the file; of this run it may know less.
        """
        own = [p for p in history.ledger.phases if p.run_id == self._run_id]
        made = sum(phase.steps for phase in own)
        self._progress.kept = max(self._progress.kept, made - self._progress.made_here)
        self.before = self.before.merged(groupings.known(history.without(self._run_id)))
        self._write(max(self._ahead, self._progress.steps_made))

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
            runs = (*self._earlier.runs, self._run_id)
            history = dataclasses.replace(self.before, ledger=self.ledger(steps))
            self._journal.write(Earlier(runs, self._spent, history))

    def begun(self) -> None:
        """Counts what callbacks have restored; see `Listener`."""
        self._agree()
        found = self.before.ledger.steps + self._progress.steps_made - self._counted_at_first
        # A backup that says nothing of its steps: they are taken for steps like these.
        self._progress.kept += max(0, self._progress.moved() - found)
        self._begin_levels()

    def _begin_levels(self) -> None:
        """Finds the place in a schedule, one for all workers: a backup may have moved it."""
        if self._levels is None:
            return
        progress, strategy = self._progress, self._session.strategy
        place = progress.place
        if strategy.place.num_workers > 1:
            place = max(strategy.gather_objects(place))
        progress.begin_at(place)
        self._saved["counted_from"] = progress.counted_from

    def _agree(self) -> None:
        """Gives all workers the largest counts: one may have read a file, or come late."""
        strategy = self._session.strategy
        if strategy.place.num_workers == 1:
            return
        progress = self._progress
        said = strategy.gather_objects(
            (self._run_id, self._spent, self.before, progress.kept, progress.made_here)
        )
        self._run_id, spent = said[0][:2]
        assert self._phase is not None
        self._phase = dataclasses.replace(self._phase, run_id=self._run_id)
        # What each of them has made by hand, in the same script, is the same.
        _AGREED.update(same_made_again(self._spent.phases, spent.phases))
        self._spent, self.before = spent, said[0][2]
        for _, theirs, before, kept, made in said:
            names = same_made_again(theirs.phases, spent.phases)
            renamed = dataclasses.replace(before, ledger=before.ledger.renamed(names))
            self.before = self.before.merged(renamed)
            progress.kept = max(progress.kept, kept)
            progress.settle(max(made, progress.made_here))

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Wraps the training; what was made counts, however it ends."""
        self._progress.look()
        self._counted_at_first = self.before.ledger.steps - self._restored
        model_history.keep(self._model, self)
        try:
            yield
        finally:
            model_history.keep(self._model, self.history())
            # Else it says too much, which is no reason to lose what was trained.
            with contextlib.suppress(CheckpointError):
                if self._journal is not None and self._journal.is_there:
                    self._write(self._progress.steps_made)
