"""One private `fit`: what is drawn, how much noise, and what it cost."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from tfdist import data, refused
from tfdist.data.arrays import Arrays
from tfdist.errors import ArgumentError, CheckpointError
from tfdist.planned import in_its_turn, plan, watch
from tfdist.privacy import clipping, memory, refusals
from tfdist.privacy.accounting import noise_for
from tfdist.privacy.budget import PrivacyBudget
from tfdist.privacy.course import Course, watched
from tfdist.privacy.in_turn import DPFTRL, SameOrder
from tfdist.privacy.journal import Journal, backup_of, steps_ahead
from tfdist.privacy.ledger import Ledger, Phase, dp_accounting
from tfdist.privacy.memory import History
from tfdist.privacy.poisson import Poisson
from tfdist.privacy.report import Report, careless_delta
from tfdist.privacy.separation import SeparationCheck
from tfdist.privacy.settings import DPSGD, Mechanism
from tfdist.privacy.step import PrivateStep
from tfdist.privacy.users import PoissonOfUsers, Users
from tfdist.samplers import Sampler, Sequential
from tfdist.session import Session
from tfdist.strategies.base import Place

_GROUPINGS: dict[str, str] = {}  # names of those that this process has seen
_ROWS_CHECKED = 3


@dataclasses.dataclass(frozen=True)
class _Everyone(Poisson):
    """Has room for all examples: batches need not be of one shape, so none is left out."""

    def bind(self, targets: Any, num_rows: int) -> Sampler:
        return Poisson(capacity=num_rows)


class PrivateRun:
    """A private `fit` from its arguments to its report.

    Args:
        privacy: The settings.
        session: Where the replicas are.
        model: A compiled `keras.Model`.
        x: What `fit` was given.
        sampler: What `fit` was given.
        shuffle: What `fit` was given.
        seed: What `fit` was given.
        class_weight: What `fit` was given.
        callbacks: What `fit` was given.
        augment: What `fit` was given.
        shard: What `fit` was given.
        validation_split: What `fit` was given.

    Attributes:
        sampler: Chooses the rows of each step.
        sampling_seed: Its seed.
        mechanism: What is done to gradients; known after `plan`.
        planned_steps: Of this `fit`.
        is_seeded: Whether the user has chosen `sampling_seed`; else it is secret.
        draws_secretly: Whether the guarantee rests on the sampling.

    Raises:
        ArgumentError: The model, or an argument, cannot be private.
        MissingPackageError: dp-accounting is not installed.
    """

    mechanism: Mechanism
    planned_steps: int

    def __init__(
        self,
        privacy: DPSGD,
        session: Session,
        model: Any,
        x: Any,
        *,
        sampler: Sampler | None,
        shuffle: Any = True,
        seed: int | None,
        class_weight: Any,
        callbacks: Any = None,
        augment: data.Augment | None = None,
        shard: Any = None,
        validation_split: float = 0.0,
    ) -> None:
        if not isinstance(privacy, DPSGD):
            raise ArgumentError(
                f"`privacy` must be a tfdist.DPSGD or None. Received: privacy={privacy!r}."
            )
        refused.check_data(session, x, sampler, class_weight, privacy)
        refused.check_copies(privacy, augment)
        refused.check_users(privacy, shard, validation_split)
        refused.check_callbacks(callbacks, x)
        dp_accounting()  # missing, it must not be missed after training
        refusals.check_model(model)
        self.privacy = privacy
        self.draws_secretly = not isinstance(privacy, DPFTRL)
        self.sampler: Sampler = _Everyone() if sampler is None else sampler
        if not self.draws_secretly:
            self.sampler = SameOrder(bool(shuffle)) if data.is_arrays(x) else Sequential()
        self._users: Users | None = None
        if privacy.group_ids is not None:
            self._users = Users(privacy.group_ids, privacy.max_rows_per_group)
            self.sampler = PoissonOfUsers(self._users, self.sampler)  # type: ignore[arg-type]
        known = privacy.seed if seed is None else seed
        self.sampling_seed = secrets.randbits(127) if known is None else known
        self._model = model
        self._session = session
        drawn = known is None or not self.draws_secretly
        self.is_seeded = known is not None
        self._course = Course(model, privacy)
        self._phase: Phase | None = None
        # What has a known seed comes out the same again: nothing is lost by a crash.
        self._is_secret = privacy.seed is None and drawn
        self._run_id = secrets.token_hex(8) if self._is_secret else ""
        self._before = self._known_of(memory.of(model)).merged(History(privacy.spent))
        self._before = dataclasses.replace(
            self._before, secret=self._before.secret and self._is_secret
        )
        self._journal: Journal | None = None
        self._ahead = 0
        self._broken_off: list[Phase] = []
        self._goes_on = False
        self._in_backup = self._counted_at_first = 0
        self._source: data.Source | None = None
        self._watch: SeparationCheck | None = None
        self.limit: float | None = None
        directory = backup_of(callbacks)
        if directory is not None and self._is_secret and not session.strategy.elastic:
            self._journal = Journal(directory)

    def _known_of(self, history: History) -> History:
        """Leaves out names of groupings that only another process could compare."""
        known = set(_GROUPINGS.values())
        phases = tuple(
            dataclasses.replace(p, groups=p.groups if p.groups in known else None)
            for p in history.ledger.phases
        )
        return dataclasses.replace(history, ledger=Ledger(phases))

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
            self._before = self._before.merged(self._known_of(found[1]))
            self._goes_on = True
            self._broken_off = [p for p in found[1].ledger.phases if p.run_id == found[0]]
            self._in_backup = sum(phase.steps for phase in self._broken_off)
        if not self._goes_on:
            self._note_changes()
        bands = getattr(self.privacy, "bands", 1)
        noise = self._course.go_on(None if saved is None else saved["noise"], kept, bands)
        return {
            "noise": noise if self._course.correlated else None,
            "history": self._before.to_dict(),
            "spent": self.privacy.spent.to_dict(),
            "run": self._run_id,
        }

    def _go_on_with(
        self, saved: dict[str, Any], kept: int, found: tuple[str, History] | None
    ) -> None:
        """Takes what a checkpoint knows, and what was made since it was written."""
        spent = Ledger.from_dict(saved["spent"])
        if self.privacy.spent.phases and self.privacy.spent.merged(spent).steps != (
            self.privacy.spent.steps
        ):
            raise ArgumentError(
                "`spent` must hold what it held when this training began, or be left out: the "
                f"checkpoint has it. Received: {self.privacy.spent.steps} steps, and "
                f"{spent.steps} in the checkpoint."
            )
        self._goes_on = True
        history = History.from_dict(saved["history"]).merged(History(spent))
        self._before = self._known_of(history).merged(History(self.privacy.spent))
        self._before = dataclasses.replace(
            self._before, secret=history.secret and self._is_secret
        )
        self._run_id = saved["run"]
        self._course.kept = kept
        if not self._is_secret:
            return
        if found is None:
            raise CheckpointError(
                "The file that counts private steps must lie beside the checkpoints: some may "
                "have been made after the last one. Received: none. Put it back, or begin anew "
                "in another directory, and pass what was spent as DPSGD(spent=...)."
            )
        written = self._known_of(found[1])
        own = [p for p in written.ledger.phases if p.run_id == self._run_id]
        made = sum(phase.steps for phase in own)
        others = dataclasses.replace(written, ledger=written.ledger.without(self._run_id))
        self._before = self._before.merged(others)
        lost = max(0, made - kept)
        if lost and self._course.correlated:
            broken = dataclasses.replace(
                own[-1], steps=lost, after=kept, run_id=secrets.token_hex(8)
            )
            self._before = dataclasses.replace(
                self._before, ledger=self._before.ledger.add(broken)
            )
        elif lost:
            self._course.kept = made
        if lost:
            self._broken_off = own

    def _note_changes(self) -> None:
        """Notes what was made of the model that is not counted."""
        updates, is_changed = memory.changed_since(self._model)
        known = self._before
        if not known.ledger.phases:
            updates = self._course.iterations
        self._before = dataclasses.replace(
            known,
            uncounted=max(known.uncounted, updates)
            if not known.ledger.phases
            else known.uncounted + updates,
            changes=known.changes + (is_changed and not updates),
        )

    def plan(self, source: data.Source, epochs: int) -> None:
        """Finds the noise, and tries the model on a few rows.

        Args:
            source: The data.
            epochs: To be made.

        Raises:
            ArgumentError: The budget is spent, or the model does not give gradients of single
                examples.
        """
        privacy, self._source = self.privacy, source
        planned = plan(privacy, source, epochs)
        self.planned_steps, phase, expected, units = planned
        phase = dataclasses.replace(phase, run_id=self._run_id, groups=self._grouping())
        self.ledger(0).add(phase).check_unit()
        noise = privacy.noise_multiplier
        if noise is None and self._noise_then(phase) is not None:
            # Steps were lost, so fewer are left than were planned: the end comes earlier.
            noise, self.limit = self._noise_then(phase), privacy.target_epsilon
        if noise is None:
            assert privacy.target_epsilon is not None
            noise = noise_for(
                dataclasses.replace(phase, steps=max(1, self.planned_steps)),
                privacy.target_epsilon,
                self._delta,
                accountant=privacy.accountant,
                relation=privacy.relation,
                spent=self.ledger(0),
            )
            strategy = self._session.strategy
            # Who joins an elastic run later would be alone with this; there it is compared.
            if not strategy.elastic:
                noise = float(strategy.broadcast_object(noise))
        self._phase = dataclasses.replace(phase, noise_multiplier=noise)
        self.mechanism = Mechanism(
            privacy.l2_norm_clip,
            noise,
            expected,
            privacy.microbatch_size,
            privacy.clipping == "per_layer",
            privacy.target_quantile,
            privacy.clip_learning_rate,
            self._count_noise(noise, units),
            units,
            None if self._users is None else self._users.most,
            privacy.augmentations,
            phase.bands,
        )
        self._try(source)
        if self._course.correlated:
            self._watch = watch(source, phase.separation, lambda: self.steps_made)

    def _grouping(self) -> str | None:
        """Names the grouping of examples by users.

        A name is random: what a file or a ledger says must not depend on who is in the data.
        """
        if self._users is None:
            return None
        return _GROUPINGS.setdefault(self._users.fingerprint, secrets.token_hex(8))

    def _noise_then(self, phase: Phase) -> float | None:
        """Gives the noise of the training that broke off, if this one goes on with it."""
        for broken in self._broken_off:
            settings = {"noise_multiplier": 0.0, "steps": phase.steps, "after": 0}
            if dataclasses.replace(broken, **settings) == phase:
                return broken.noise_multiplier
        return None

    def _count_noise(self, noise: float, units: float) -> float:
        if self.privacy.target_quantile is None or noise == 0:
            return 0.0
        chosen = self.privacy.count_noise
        found = units / 20 if chosen is None else chosen
        if 2 * found <= noise:
            raise ArgumentError(
                "`count_noise` must be above noise_multiplier / 2, or nothing is left for the "
                f"gradients. Received: {found:g}, and noise_multiplier={noise:g}. Pass a "
                "larger `count_noise`, or a larger `batch_size`."
            )
        return found

    def _try(self, source: data.Source) -> None:
        if isinstance(source, Arrays):
            rows = range(min(_ROWS_CHECKED, source.num_local_rows))
            batch = tf.nest.map_structure(lambda column: tf.gather(column, rows), source.data)
        else:  # as the model will see them, augmented
            share = next(iter(source.shares(Place())))
            batch = tf.nest.map_structure(lambda column: column[:_ROWS_CHECKED], share.data)
        x, y, weight = keras.utils.unpack_x_y_sample_weight(batch)
        clipping.check(self._model, x, y, sample_weight=weight)
        refusals.check_metrics(self._model, x, y, sample_weight=weight)

    def notice(self) -> str | None:
        """Says that `delta` is too large; in a model's first private `fit`, what is slow."""
        slow = [] if self._before.ledger.phases else clipping.computed_alone(self._model)
        alone = f"computed for one example after the other, exact but slow: {', '.join(slow)}"
        careless = careless_delta(self.ledger(self.planned_steps), self._delta)
        return "\ntfdist: ".join([*[alone] * bool(slow), *filter(None, [careless])]) or None

    @property
    def _delta(self) -> float:
        assert self.privacy.delta is not None  # DPSGD has checked it
        return self.privacy.delta

    @property
    def asked(self) -> dict[str, Any]:
        """What all workers must have been asked alike."""
        return {
            "l2_norm_clip": self.privacy.l2_norm_clip,
            "clipping": (self.privacy.clipping, self.privacy.target_quantile),
            "noise_multiplier": self.mechanism.noise_multiplier,
            "delta": self.privacy.delta,
            "relation": self.privacy.relation,
            "spent before": self.ledger(0),
            "users": None if self._users is None else self._users.fingerprint,
            "augmentations": self.privacy.augmentations,
        }

    @property
    def settings(self) -> dict[str, Any]:
        """What must stay as it is in a training that goes on: its steps are one phase."""
        described = dataclasses.asdict(self.phase(0))
        for name in ("run_id", "groups", "after"):
            del described[name]
        in_turn = self._course.correlated and self._source is not None
        return {
            "l2_norm_clip": self.mechanism.l2_norm_clip,
            "users": None if self._users is None else self._users.fingerprint,
            "augmentations": self.privacy.augmentations,
            **described,
            **(in_its_turn(self._model, self._source) if in_turn else {}),
        }

    @property
    def steps_made(self) -> int:
        """Steps of this training, those that an earlier process made included."""
        return self._course.steps_made

    @property
    def kept(self) -> int:
        """Those that an earlier process made."""
        return self._course.kept

    def ledger(self, steps: int) -> Ledger:
        """Gives all private steps on the data.

        Args:
            steps: Of this training.
        """
        before = self._before.ledger
        return before if self._phase is None else before.add(self.phase(steps))

    def phase(self, steps: int) -> Phase:
        """Describes steps of this training.

        Args:
            steps: How many.
        """
        assert self._phase is not None
        return dataclasses.replace(self._phase, steps=steps)

    def history(self) -> History:
        """Gives what is in the weights now; see `memory.Run`."""
        return dataclasses.replace(self._before, ledger=self.ledger(self.steps_made))

    def absorb(self, history: History) -> None:
        """Takes what a file says whose weights a callback has loaded.

        Args:
            history: Of the file; of this training it may know less.
        """
        own = [p for p in history.ledger.phases if p.run_id and p.run_id == self._run_id]
        made = sum(phase.steps for phase in own)
        self._course.kept = max(self._course.kept, made - self._course.made_here)
        others = history.ledger.without(self._run_id) if own else history.ledger
        known = self._known_of(dataclasses.replace(history, ledger=others))
        self._before = self._before.merged(known)

    def report(self) -> Report:
        """Sums up what was made until now."""
        history = self.history()
        return Report(
            history.ledger,
            delta=self._delta,
            accountant=self.privacy.accountant,
            relation=self.privacy.relation,
            secret=history.secret,
            uncounted_steps=history.uncounted,
            changes=history.changes,
        )

    def watched(self, callbacks: Any, step: PrivateStep) -> Any:
        """Adds to the callbacks what keeps count, and renews the noise.

        Args:
            callbacks: A list of callbacks, or a `CallbackList`.
            step: What will be made.
        """
        self._course.restart(step)
        self._ahead = 0
        given = getattr(callbacks, "callbacks", callbacks)
        if self.limit is not None:
            given.append(PrivacyBudget(self.limit))
        for callback in given:
            if isinstance(callback, PrivacyBudget):
                callback.run = self
        return watched(callbacks, self._course, self)

    def before_steps(self, steps: int) -> None:
        """Writes steps down before they are made; see `Listener`.

        Args:
            steps: Of this training.
        """
        if self._journal is None or steps <= self._ahead:
            return
        at_once = int(self._model.steps_per_execution)
        self._ahead = steps - at_once + steps_ahead(self.planned_steps, at_once)
        self._write(self._ahead)

    def _write(self, steps: int) -> None:
        if self._journal is not None and self._session.is_chief:
            history = dataclasses.replace(self._before, ledger=self.ledger(steps))
            self._journal.write(self._run_id, history)

    def begun(self) -> None:
        """Counts what callbacks have restored; see `Listener`."""
        self._agree()
        found = self._before.ledger.steps + self.steps_made - self._counted_at_first
        # A backup that says nothing of its steps: they are taken for steps like these.
        self._course.kept += max(0, self._course.moved() - found)

    def _agree(self) -> None:
        """Gives all workers the largest counts: one may have read a file, or come late."""
        strategy = self._session.strategy
        if strategy.place.num_workers == 1:
            return
        course = self._course
        said = strategy.gather_objects(
            (self._run_id, self._before, course.kept, course.made_here)
        )
        self._run_id = said[0][0]
        assert self._phase is not None
        self._phase = dataclasses.replace(self._phase, run_id=self._run_id)
        for _, before, kept, made in said:
            self._before = self._before.merged(before)
            course.kept = max(course.kept, kept)
            course.settle(max(made, course.made_here))

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Wraps the training; what was made counts, however it ends."""
        self._course.look()
        self._counted_at_first = self._before.ledger.steps - self._in_backup
        memory.keep(self._model, self)
        try:
            yield
        except tf.errors.OpError:
            if self._watch is None or self._watch.problem is None:
                raise
            raise ArgumentError(self._watch.problem) from None
        finally:
            memory.keep(self._model, self.history())
            if self._journal is not None and self._journal.is_there:
                self._write(self.steps_made)

    def note_restored(self) -> None:
        """Called when a checkpoint was restored."""
        self._course.number_by_optimizer()
        self._course.look()
