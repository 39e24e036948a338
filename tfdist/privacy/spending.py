"""The privacy that a training has spent, with all that was spent on its weights before."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
from collections.abc import Iterator
from typing import Any

from tfdist.errors import CheckpointError
from tfdist.privacy import groupings, model_history
from tfdist.privacy.accounting.identity import like_steps, same_made_again
from tfdist.privacy.accounting.ledger import CLIENT, Ledger, Phase
from tfdist.privacy.accounting.levels import Levels
from tfdist.privacy.accounting.silos import Silos
from tfdist.privacy.client_dp import ClientDP
from tfdist.privacy.journal import SpendingJournal, backup_of, steps_ahead
from tfdist.privacy.model_history import History
from tfdist.privacy.outside_changes import OutsideChanges
from tfdist.privacy.progress import StepProgress
from tfdist.privacy.resumption import Earlier, saved_state, with_phase
from tfdist.privacy.settings import DPSGD
from tfdist.strategies.session import Session

_AGREED: dict[str, str] = {}  # the chief's run names of phases that each worker made by hand


class Spending:
    """Accounts for the steps of one private `fit`.

    Args:
        privacy: The settings.
        session: The session of `fit`.
        model: A compiled `keras.Model`.
        progress: The step count of this training.
        callbacks: The argument `callbacks` of `fit`.
        secret: Whether all random numbers come from the operating system. Steps with a known
            seed can be repeated after a crash, so they need no journal.

    Attributes:
        before: The history of all other steps on the data, before this training or beside it.
        outside: Notices what callbacks do to the weights between steps.
        limit: The target epsilon, if training may have to end before its last step. None if
            all planned steps are within the target.
    """

    def __init__(
        self,
        privacy: DPSGD | ClientDP,
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
        self.outside = OutsideChanges(model, self._note_outside)
        self._is_secret = secret
        self._run_id = secrets.token_hex(8)
        self._phase: Phase | None = None
        self._levels: Levels | Silos | None = None
        self._planned_steps = self._journaled_steps = 0
        self._earlier = Earlier()
        self._noise: float | None = None
        self._saved: dict[str, Any] = {}
        self._spent = privacy.spent.renamed(_AGREED)
        self.before = self._history_before()
        self._journal: SpendingJournal | None = None
        directory = backup_of(callbacks)
        if directory is not None and secret and not session.strategy.elastic:
            self._journal = SpendingJournal(directory)

    def _history_before(self) -> History:
        """Merges the steps of earlier processes, of `spent` and of the model."""
        history = self._earlier.history.merged(History(self._earlier.spent))
        history = history.merged(History(self._spent)).merged(model_history.of(self._model))
        return groupings.comparable(
            dataclasses.replace(history, secret=history.secret and self._is_secret)
        )

    def named(self, phase: Phase, users: str | None) -> Phase:
        """Adds the names of this process's run and of its grouping of examples to a phase.

        Names are random, since files and ledgers must not depend on the users in the data.

        Args:
            phase: A phase of this training.
            users: The fingerprint of the grouping, or None.
        """
        groups = None
        if users is not None:
            groups = groupings.name_of(users)
        after = self._progress.position if self._progress.correlated else 0
        return dataclasses.replace(
            phase, run_id=self._run_id, groups=groups, after=after,
            continues=self._earlier.newest, secret=self._is_secret,
        )  # fmt: skip

    def plan(self, phase: Phase, steps: int, levels: Levels | Silos | None = None) -> None:
        """Sets the planned steps.

        Args:
            phase: The phase in which steps are counted.
            steps: The number of planned steps, with those in a checkpoint.
            levels: The levels of the noise if it follows a schedule, or the clients that each
                make steps of their own, else None.
        """
        self._phase, self._planned_steps, self._levels = phase, steps, levels
        with_phase(self._saved, phase, levels, self._progress.counted_from)
        privacy, target = self._privacy, self._privacy.target_epsilon
        if target is None or self._noise is None:
            return
        assert privacy.delta is not None
        planned_ledger = self.ledger(max(0, steps - self._progress.position))
        planned_epsilon = planned_ledger.epsilon(
            privacy.delta, accountant=privacy.accountant, relation=privacy.relation
        )
        self.limit = target if planned_epsilon > target else None

    def go_on(
        self, saved: dict[str, Any] | None = None, steps: int = 0, directory: Any = None
    ) -> dict[str, Any]:
        """Reads the records of earlier processes of this `fit`.

        The steps of this process get their own name, also if it continues the training of
        another process. Two processes may continue from copies of a folder, and each then
        makes its own steps.

        Args:
            saved: The return value of this method in an earlier process, or None.
            steps: The number of steps of this `fit` in the saved weights.
            directory: The directory of the `Checkpoint`, or None.

        Returns:
            Plain data to be saved, after `plan` has been called.

        Raises:
            ArgumentError: `spent` is not that of the earlier processes.
            CheckpointError: The number of steps that were made is unknown.
        """
        if directory is not None:
            self._journal = SpendingJournal(directory) if self._is_secret else None
        journaled = None if self._journal is None else self._journal.read()
        # Names are random, so all workers take those of the chief.
        strategy = self._session.strategy
        if self._journal is not None or saved is not None:
            journaled, self._run_id = strategy.broadcast_object((journaled, self._run_id))
        if saved is not None:
            self._go_on_with(saved, steps, journaled)
        elif journaled is not None:
            # The journal of a `BackupAndRestore`, which has no state of ours.
            self._earlier = journaled
            names = same_made_again(self._spent.phases, journaled.spent.phases)
            self._spent = self._spent.renamed(names)
            self.before = self._history_before()
        if saved is None:  # a checkpoint brings other weights
            counts_rounds = any(phase.unit == CLIENT for phase in self._spent.phases)
            explained = self._spent.steps * (self._progress.updates if counts_rounds else 1)
            self.before = model_history.with_changes(self._model, self.before, explained)
        bands = self._privacy.bands or 1
        noise = self._progress.go_on(None if saved is None else saved["noise"], steps, bands)
        before = dataclasses.replace(self._earlier, spent=self._spent, history=self.before)
        self._saved = saved_state(before, self._run_id, steps)
        self._saved["noise"] = noise if self._progress.correlated else None
        return self._saved

    def _go_on_with(self, saved: dict[str, Any], steps: int, journaled: Earlier | None) -> None:
        """Reads the record of a checkpoint, and of steps since it was written."""
        earlier = Earlier.of_checkpoint(saved, steps)
        self._spent = self._spent.renamed(earlier.names_of(self._spent)).merged(earlier.spent)
        # Steps after the checkpoint are not in the weights, but they have been released to
        # whoever saw the lost weights. So they count, unless the same noise repeats them.
        self._earlier = earlier.completed(journaled) if self._is_secret else earlier
        self.before = self._history_before()

    def earlier_noise(self, phase: Phase, levels: Levels | Silos | None = None) -> float | None:
        """Returns the noise of the interrupted training that this one continues, or None.

        If steps were lost, the target leaves room for fewer steps than planned, and training
        ends earlier. See `limit`.

        Args:
            phase: One step, without noise.
            levels: The levels of a schedule, or the clients, or None. With levels the result
                is the factor by which they were multiplied.
        """
        phases = self._earlier.in_order
        if levels is not None:
            self._noise = levels.factor_in(phases, phase)
            return self._noise
        for earlier in phases:
            noise, steps = phase.noise_multiplier, phase.steps
            as_now = dataclasses.replace(
                earlier, noise_multiplier=noise, steps=steps, after=phase.after
            )
            if as_now == phase:
                self._noise = earlier.noise_multiplier
        return self._noise

    def notice(self) -> str | None:
        """Returns a warning that `spent` may count steps twice, or None."""
        return like_steps(self._spent.phases, self.before.ledger.phases)

    def ledger(self, steps: int) -> Ledger:
        """Returns all private steps on the data.

        Args:
            steps: The number of steps of this training.
        """
        ledger = self.before.ledger
        for phase in self._phases(steps):
            ledger = ledger.add(phase)
        return ledger

    def _phases(self, steps: int) -> list[Phase]:
        """Describes steps of this training, one phase for each noise."""
        if self._phase is None:
            return []
        progress = self._progress
        if self._levels is not None:
            return self._levels.phases(self._phase, progress.counted_from, steps)
        if not self._phase.cyclic:
            return [self.phase(steps)]
        # A backup without a record has steps of another process. Correlated noise does not
        # continue over processes, so these steps are a mechanism of their own.
        from_backup = min(progress.restored_steps, steps)
        earlier = dataclasses.replace(self.phase(from_backup), run_id=f"{self._run_id}-before")
        return [earlier, self.phase(steps - from_backup)]

    def phase(self, steps: int) -> Phase:
        """Describes steps of this training.

        Args:
            steps: The number of steps.
        """
        assert self._phase is not None
        return dataclasses.replace(self._phase, steps=steps)

    def history(self) -> History:
        """Returns the history of the current weights; see `model_history.RunUnderWay`."""
        return dataclasses.replace(self.before, ledger=self.ledger(self._progress.steps_made))

    def absorb(self, history: History) -> None:
        """Adds the history of a file whose weights a callback has loaded.

        Args:
            history: The history of the file. It may have fewer steps of this run.
        """
        of_this_run = [p for p in history.ledger.phases if p.run_id == self._run_id]
        steps = sum(phase.steps for phase in of_this_run)
        if self._levels is not None:
            steps = self._levels.steps_in(of_this_run)
        # A file may have more steps of this run than this process has made: then another
        # process made them.
        self._progress.restored_steps = max(
            self._progress.restored_steps, steps - self._progress.process_steps
        )
        self.before = self.before.merged(groupings.comparable(history.without(self._run_id)))
        self.outside.accept()
        self._write(max(self._journaled_steps, self._progress.steps_made))

    def settle(self) -> None:
        """Notes what a callback has done so far; see `model_history.RunUnderWay`."""
        self.outside.settle_meanwhile()

    def _note_outside(self, updates: int) -> None:
        """Notes that a callback has changed the weights before steps or between them.

        Only steps that the counter has counted, or that a record has, are private.
        """
        self._progress.unrecorded += updates
        # Weights that a callback sets before the first private step are not noted.
        if updates or self.history().ledger.steps:
            self.before = self.before.changed(updates)
            self._write(max(self._journaled_steps, self._progress.steps_made))

    def before_steps(self, steps: int) -> None:
        """Writes coming steps to the journal; see `Listener`.

        Args:
            steps: The number of steps of this training after the coming ones.
        """
        if self._journal is None or steps <= self._journaled_steps:
            return
        at_once = int(self._model.steps_per_execution)
        self._journaled_steps = steps - at_once + steps_ahead(self._planned_steps, at_once)
        self._write(self._journaled_steps)

    def _write(self, steps: int) -> None:
        if self._journal is not None and self._session.is_chief:
            runs = (*self._earlier.runs, self._run_id)
            history = dataclasses.replace(self.before, ledger=self.ledger(steps))
            self._journal.write(Earlier(runs, self._spent, history))

    def callbacks_began(self) -> None:
        """Agrees on what callbacks have restored; see `Listener`."""
        self._agree()
        self._begin_levels()

    def _begin_levels(self) -> None:
        """Sets the place in a schedule, equal on all workers. A backup may have moved it."""
        if self._levels is None:
            return
        progress, strategy = self._progress, self._session.strategy
        place = progress.place
        if strategy.place.num_workers > 1:
            place = max(strategy.gather_objects(place))
        progress.begin_at(place)
        self._saved["counted_from"] = progress.counted_from

    def _agree(self) -> None:
        """Gives all workers the largest counts. One may have read a file, or joined late."""
        strategy = self._session.strategy
        if strategy.place.num_workers == 1:
            return
        progress = self._progress
        counts = progress.restored_steps, progress.process_steps
        records = strategy.gather_objects((self._run_id, self._spent, self.before, *counts))
        self._run_id, spent = records[0][:2]
        assert self._phase is not None
        self._phase = dataclasses.replace(self._phase, run_id=self._run_id)
        # Each worker runs the same script, so phases that each made by hand are the same.
        _AGREED.update(same_made_again(self._spent.phases, spent.phases))
        self._spent, self.before = spent, records[0][2]
        for _, worker_spent, worker_before, restored_steps, process_steps in records:
            names = same_made_again(worker_spent.phases, spent.phases)
            ledger = worker_before.ledger.renamed(names)
            self.before = self.before.merged(dataclasses.replace(worker_before, ledger=ledger))
            progress.restored_steps = max(progress.restored_steps, restored_steps)
            progress.settle(max(process_steps, progress.process_steps))

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Returns a context for the training. Its steps count even if it fails."""
        self._progress.look()
        model_history.keep(self._model, self)
        try:
            yield
        finally:
            self.outside.settle()  # a callback may have failed
            model_history.keep(self._model, self.history())
            # If this fails, the journal counts too many steps. That is safe, and no reason to
            # lose the trained model.
            with contextlib.suppress(CheckpointError):
                if self._journal is not None and self._journal.is_there:
                    self._write(self._progress.steps_made)
