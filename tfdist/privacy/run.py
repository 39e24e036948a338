"""One private `fit`: what is drawn, how much noise, and what it cost."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist import data
from tfdist.data.arrays import Arrays
from tfdist.data.separation import SeparationCheck
from tfdist.errors import ArgumentError
from tfdist.privacy import leaking_callbacks, validation
from tfdist.privacy.accounting.ledger import Ledger, dp_accounting
from tfdist.privacy.accounting.report import Report, careless_delta
from tfdist.privacy.budget import PrivacyBudget
from tfdist.privacy.calibration import find_noise
from tfdist.privacy.dpftrl import SameOrder
from tfdist.privacy.leaking_callbacks import StepLogs
from tfdist.privacy.mechanism import clipping, independence, unfit_layers
from tfdist.privacy.mechanism.mechanism import Mechanism
from tfdist.privacy.mechanism.spot_checks import SpotChecks
from tfdist.privacy.mechanism.step import PrivateStep
from tfdist.privacy.planning import in_its_turn, plan, watch
from tfdist.privacy.progress import StepProgress, watched
from tfdist.privacy.sampling.cyclic import CyclicPoisson
from tfdist.privacy.sampling.poisson import Poisson
from tfdist.privacy.sampling.users import PoissonOfUsers, Users
from tfdist.privacy.schedules import norm_of
from tfdist.privacy.settings import DPSGD
from tfdist.privacy.spending import Spending
from tfdist.samplers import Sampler, Sequential
from tfdist.step.composition import traced_steps
from tfdist.strategies.base import Place
from tfdist.training.request import Request


@dataclasses.dataclass(frozen=True)
class _Everyone(Poisson):
    """Has room for all examples: batches need not be of one shape, so none is left out."""

    def bind(self, targets: Any, num_rows: int) -> Sampler:
        return Poisson(capacity=num_rows)


class PrivateRun:
    """A private `fit` from its arguments to its report.

    Args:
        privacy: What `fit` was given.
        request: What is asked for besides.

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

    def __init__(self, privacy: Any, request: Request) -> None:
        session, model, x, seed = request.session, request.model, request.x, request.seed
        callbacks = request.callbacks
        if not isinstance(privacy, DPSGD):
            raise ArgumentError(
                f"`privacy` must be a tfdist.DPSGD or None. Received: privacy={privacy!r}."
            )
        validation.check_data(session, x, request.sampler, request.class_weight, privacy)
        validation.check_copies(privacy, request.augment)
        validation.check_users(privacy, request.shard, request.validation_split)
        given = getattr(callbacks, "callbacks", callbacks)
        self._callbacks = [*given] if isinstance(given, list | tuple) else [given]
        validation.check_callbacks(callbacks, x)
        self._validates_inside = validation.check_validation(
            callbacks, x, request.validation_data, request.validation_split
        )
        dp_accounting()  # missing, it must not be missed after training
        unfit_layers.check_model(model)
        self.privacy = privacy
        self.draws_secretly = privacy.samples
        self.sampler: Sampler = request.sampler or _Everyone()
        if privacy.samples and privacy.bands is not None:
            self.sampler = CyclicPoisson(privacy.bands)
        if not self.draws_secretly:
            self.sampler = (
                SameOrder(bool(request.shuffle)) if data.is_arrays(x) else Sequential()
            )
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
        self._progress = StepProgress(model, privacy)
        self._spending = Spending(
            privacy,
            session,
            model,
            self._progress,
            callbacks,
            secret=privacy.seed is None and drawn,
        )
        self._watch: SeparationCheck | None = None
        self._source: data.Source | None = None
        self._spot_checks: SpotChecks | None = None

    def go_on(
        self, saved: dict[str, Any] | None = None, kept: int = 0, directory: Any = None
    ) -> dict[str, Any]:
        """Takes what earlier processes knew; see `Spending.go_on`."""
        return self._spending.go_on(saved, kept, directory)

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
        for step in traced_steps(self._model):
            if step.raw:
                raise unfit_layers.keeps_state(step.raw[0])
        planned = plan(privacy, source, epochs)
        self.planned_steps, phase, expected, units = planned
        users = None if self._users is None else self._users.fingerprint
        phase = self._spending.named(phase, users)
        everything = self.ledger(0).add(dataclasses.replace(phase, steps=1))
        everything.check_unit()
        everything.check_relation(privacy.relation)
        noise, schedule = find_noise(privacy, self._session, self._spending, planned, phase)
        phase = dataclasses.replace(phase, noise_multiplier=noise)
        self._spending.plan(phase, self.planned_steps, schedule)
        self.mechanism = Mechanism(
            norm_of(privacy),
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
            phase.cyclic,
            schedule,
        )
        self._steps_of_epoch = source.steps
        self._mask_seed = self._agreed_mask_seed(source)
        self._try(source)
        leaking_callbacks.check_names(self._callbacks, self._model.get_metrics_result())
        if self._progress.correlated:
            self._watch = watch(source, phase.separation, lambda: self._progress.position)

    def _agreed_mask_seed(self, source: data.Source) -> int:
        """Gives the seed of random numbers of rows: secret if none was chosen."""
        if self.draws_secretly:
            return int(source.drawn_from.seed)  # type: ignore[attr-defined]  # of `Arrays`
        if self.is_seeded:
            return self.sampling_seed
        strategy = self._session.strategy
        # Who joins an elastic run later would be alone with it; then only contents count.
        return 0 if strategy.elastic else int(strategy.broadcast_object(self.sampling_seed))

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

    @property
    def _rows_tried(self) -> int:
        return min(independence.ROWS, max(4, self.privacy.microbatch_size or independence.ROWS))

    def _try(self, source: data.Source) -> None:
        if isinstance(source, Arrays):
            rows = np.linspace(0, source.num_local_rows - 1, self._rows_tried)
            rows = np.unique(rows.astype(np.int64))  # side by side they may be alike
            batch = tf.nest.map_structure(lambda column: tf.gather(column, rows), source.data)
        else:  # as the model will see them, augmented
            share = next(iter(source.shares(Place())))
            batch = tf.nest.map_structure(
                lambda column: column[: independence.ROWS], share.data
            )
        x, y, weight = keras.utils.unpack_x_y_sample_weight(batch)
        independence.check(self._model, x, y, sample_weight=weight)
        unfit_layers.check_metrics(self._model, x, y, sample_weight=weight)

    def notice(self) -> str | None:
        """Says that `delta` is too large; in a model's first private `fit`, what is slow."""
        slow = (
            [] if self._spending.before.ledger.phases else clipping.computed_alone(self._model)
        )
        alone = f"computed for one example after the other, exact but slow: {', '.join(slow)}"
        careless = careless_delta(self.ledger(self.planned_steps), self._delta)
        lines = [alone if slow else None, careless, self._spending.notice()]
        return "\ntfdist: ".join(filter(None, lines)) or None

    @property
    def _delta(self) -> float:
        assert self.privacy.delta is not None  # DPSGD has checked it
        return self.privacy.delta

    @property
    def asked(self) -> dict[str, Any]:
        """What all workers must have been asked alike."""
        return {
            "l2_norm_clip": self.mechanism.l2_norm_clip,
            "clipping": (self.privacy.clipping, self.privacy.target_quantile),
            "noise_multiplier": self.mechanism.noise_multiplier,
            "delta": self.privacy.delta,
            "relation": self.privacy.relation,
            "spent before": self.ledger(0),
            "users": None if self._users is None else self._users.fingerprint,
            "augmentations": self.privacy.augmentations,
            "schedule": self._schedule_text,
            "bands": self.privacy.bands,
        }

    @property
    def _schedule_text(self) -> str | None:
        schedule = self.mechanism.schedule
        return None if schedule is None else schedule.fingerprint

    @property
    def settings(self) -> dict[str, Any]:
        """What must stay as it is in a training that goes on: its steps are one phase."""
        described = dataclasses.asdict(self._spending.phase(0))
        left_out = ["run_id", "groups", "after", "continues", "secret"]
        if self._schedule_text is not None and self.privacy.target_epsilon is None:
            left_out.append("noise_multiplier")  # of more epochs the least may be another
        for name in left_out:
            del described[name]
        in_turn = self._source if self._progress.correlated else None
        return {
            "l2_norm_clip": self.mechanism.l2_norm_clip,
            "users": None if self._users is None else self._users.fingerprint,
            "augmentations": self.privacy.augmentations,
            **described,
            **({} if in_turn is None else in_its_turn(self._model, in_turn)),
        }

    @property
    def steps_made(self) -> int:
        """Steps of this training, those that an earlier process made included."""
        return self._progress.steps_made

    @property
    def kept(self) -> int:
        """Those that an earlier process made."""
        return self._progress.kept

    def ledger(self, steps: int) -> Ledger:
        """Gives all private steps on the data.

        Args:
            steps: Of this training.
        """
        return self._spending.ledger(steps)

    def report(self) -> Report:
        """Sums up what was made until now."""
        history = self._spending.history()
        return Report(
            history.ledger,
            delta=self._delta,
            accountant=self.privacy.accountant,
            relation=self.privacy.relation,
            secret=history.is_secret,
            uncounted_steps=history.uncounted,
            changes=history.changes,
            validated_inside=self._validates_inside,
            norm_changes=callable(self.privacy.l2_norm_clip),
        )

    def watched(self, callbacks: Any, step: PrivateStep) -> Any:
        """Adds to the callbacks what keeps count, and renews the noise.

        Args:
            callbacks: A list of callbacks, or a `CallbackList`.
            step: What will be made.
        """
        self._progress.restart(step)
        step.masks.renew(self._mask_seed)
        step.spot_checks.begin(self._steps_of_epoch)
        self._spot_checks = step.spot_checks
        given = getattr(callbacks, "callbacks", callbacks)
        if self._spending.limit is not None:
            given.append(PrivacyBudget(self._spending.limit))
        for callback in given:
            if isinstance(callback, PrivacyBudget):
                callback.run = self
        noisy = () if self.privacy.target_quantile is None else ("l2_norm_clip",)
        names = StepLogs(self._callbacks, noisy)
        return watched(callbacks, self._progress, self._spending, names)

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Wraps the training; what was made counts, however it ends."""
        with self._spending.counting():
            try:
                yield
                if self._spot_checks is not None:
                    self._spot_checks.raise_if_failed()
            except tf.errors.OpError as error:
                is_check_s = isinstance(error, tf.errors.InvalidArgumentError)
                if is_check_s and self._spot_checks is not None:
                    self._spot_checks.raise_if_failed(error)
                if self._watch is None or self._watch.problem is None:
                    raise
                raise ArgumentError(self._watch.problem) from None

    def note_restored(self) -> None:
        """Called when a checkpoint was restored."""
        self._progress.number_by_optimizer()
        self._progress.look()
