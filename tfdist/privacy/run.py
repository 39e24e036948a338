"""One private `fit`: its sampling, its noise and its cost."""

from __future__ import annotations

import contextlib
import dataclasses
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
from tfdist.privacy.accounting.report import careless_delta
from tfdist.privacy.calibration import check_count_noise, find_noise
from tfdist.privacy.counted_run import CountedRun
from tfdist.privacy.dpftrl import SameOrder
from tfdist.privacy.mechanism import clipping, comparison, independence, unfit_layers
from tfdist.privacy.mechanism.mechanism import Mechanism
from tfdist.privacy.mechanism.spot_checks import SpotChecks
from tfdist.privacy.mechanism.step import PrivateStep
from tfdist.privacy.planning import in_its_turn, plan, watch
from tfdist.privacy.sampling.cyclic import CyclicPoisson
from tfdist.privacy.sampling.poisson import Poisson
from tfdist.privacy.sampling.users import PoissonOfUsers, Users
from tfdist.privacy.schedules import norm_of
from tfdist.privacy.settings import DPSGD
from tfdist.samplers import Sampler, Sequential
from tfdist.step.composition import traced_steps
from tfdist.strategies.base import Place
from tfdist.training.request import Request


@dataclasses.dataclass(frozen=True)
class _Everyone(Poisson):
    """Poisson sampling without a capacity: batches need not have one shape."""

    def bind(self, targets: Any, num_rows: int) -> Sampler:
        return Poisson(capacity=num_rows)


class PrivateRun(CountedRun[DPSGD]):
    """A private `fit` from its arguments to its report.

    Args:
        privacy: The argument `privacy` of `fit`.
        request: The other arguments of `fit`.

    Attributes:
        sampler: The sampler of the rows of each step.
        mechanism: The clipping and the noise. It is set by `plan`.
        draws_secretly: Whether the guarantee depends on secret sampling.

    Raises:
        ArgumentError: The model or an argument cannot be used in private training.
        MissingPackageError: dp-accounting is not installed.
    """

    mechanism: Mechanism

    def __init__(self, privacy: Any, request: Request) -> None:
        x = request.x
        if not isinstance(privacy, DPSGD):
            raise ArgumentError(
                f"`privacy` must be a tfdist.DPSGD or None. Received: privacy={privacy!r}. "
                "A tfdist.ClientDP is the `privacy` of tfdist.FedAvg."
            )
        validation.check_data(
            request.session, x, request.sampler, request.class_weight, privacy
        )
        validation.check_copies(privacy, request.augment)
        validation.check_users(privacy, request.shard, request.validation_split)
        super().__init__(privacy, request)
        unfit_layers.check_model(request.model)
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
        self._begin_count(request, not self.is_seeded or not self.draws_secretly)
        self._watch: SeparationCheck | None = None
        self._source: data.Source | None = None
        self._spot_checks: SpotChecks | None = None

    def plan(self, source: data.Source, epochs: int) -> None:
        """Calibrates the noise, and checks the model on a few rows.

        Args:
            source: The data.
            epochs: The number of epochs.

        Raises:
            ArgumentError: The budget is spent, or the gradients of single examples cannot be
                computed.
        """
        privacy, self._source = self.privacy, source
        for step in traced_steps(self._model):
            if step.raw:
                raise unfit_layers.keeps_state(step.raw[0])
        step_plan = plan(privacy, source, epochs, int(self._model.steps_per_execution))
        self.planned_steps, phase, expected, units = step_plan
        users = None if self._users is None else self._users.fingerprint
        phase = self._spending.named(phase, users)
        with_first_step = self.ledger(0).add(dataclasses.replace(phase, steps=1))
        with_first_step.check_unit()
        with_first_step.check_relation(privacy.relation)
        noise, schedule = find_noise(privacy, self._session, self._spending, step_plan, phase)
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
            None if self._users is None else self._users.limit,
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
        """Returns the seed of rows' random numbers. It is secret unless the user chose one."""
        if self.draws_secretly:
            return int(source.drawn_from.seed)  # type: ignore[attr-defined]  # of `Arrays`
        if self.is_seeded:
            return self.seed
        strategy = self._session.strategy
        # A worker that joins an elastic run later would be alone in this collective. With a
        # constant seed, random numbers of rows follow from the contents of rows alone.
        return 0 if strategy.elastic else int(strategy.broadcast_object(self.seed))

    def _count_noise(self, noise: float, units: float) -> float:
        if self.privacy.target_quantile is None or noise == 0:
            return 0.0
        user_noise = self.privacy.count_noise
        count_noise = units / 20 if user_noise is None else user_noise
        check_count_noise(count_noise, noise, "gradients", "a larger `batch_size`")
        return count_noise

    @property
    def _rows_tried(self) -> int:
        return min(comparison.ROWS, max(4, self.privacy.microbatch_size or comparison.ROWS))

    def _try(self, source: data.Source) -> None:
        """Checks the model and its metrics on a few rows."""
        if isinstance(source, Arrays):
            rows = np.linspace(0, source.num_local_rows - 1, self._rows_tried)
            rows = np.unique(rows.astype(np.int64))  # neighbours may be equal, so not the first
            batch = tf.nest.map_structure(lambda column: tf.gather(column, rows), source.data)
        else:  # rows of the first batch, with augmentation
            first_batch = next(iter(source.shares(Place())))
            batch = tf.nest.map_structure(
                lambda column: column[: comparison.ROWS], first_batch.data
            )
        x, y, weight = keras.utils.unpack_x_y_sample_weight(batch)
        independence.check(self._model, x, y, weight, self.mechanism.l2_norm_clip)
        unfit_layers.check_metrics(self._model, x, y, sample_weight=weight)

    def notice(self) -> str | None:
        """Warns of a large `delta`, and of slow parts in a model's first private `fit`."""
        slow = (
            [] if self._spending.before.ledger.phases else clipping.computed_alone(self._model)
        )
        alone = f"computed for one example after the other, exact but slow: {', '.join(slow)}"
        careless = careless_delta(self.ledger(self.planned_steps), self._delta)
        lines = [alone if slow else None, careless, self._spending.notice()]
        return "\ntfdist: ".join(filter(None, lines)) or None

    @property
    def common_settings(self) -> dict[str, Any]:
        """The settings that must be equal on all workers."""
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
        """The settings that must not change in a continued training."""
        left_out: list[str] = []
        if self._schedule_text is not None and self.privacy.target_epsilon is None:
            left_out.append("noise_multiplier")  # the schedule's least changes with the epochs
        in_turn = self._source if self._progress.correlated else None
        return {
            "l2_norm_clip": self.mechanism.l2_norm_clip,
            "users": None if self._users is None else self._users.fingerprint,
            "augmentations": self.privacy.augmentations,
            **self._phase_settings(*left_out),
            **({} if in_turn is None else in_its_turn(self._model, in_turn)),
        }

    def watched(self, callbacks: Any, step: PrivateStep) -> Any:
        """Adds callbacks that count steps, and renews the noise.

        Args:
            callbacks: A list of callbacks, or a `CallbackList`.
            step: The step function of the training.
        """
        step.masks.renew(self._mask_seed)
        step.spot_checks.begin(self._steps_of_epoch)
        self._spot_checks = step.spot_checks
        noisy = () if self.privacy.target_quantile is None else ("l2_norm_clip",)
        return self._counted(callbacks, step, noisy)

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Returns a context for the training. Its steps count even if it fails."""
        with super().counting():
            try:
                yield
                if self._spot_checks is not None:
                    self._spot_checks.raise_if_failed()
            except tf.errors.OpError as error:
                may_be_check = isinstance(error, tf.errors.InvalidArgumentError)
                if may_be_check and self._spot_checks is not None:
                    self._spot_checks.raise_if_failed(error)
                if self._watch is None or self._watch.problem is None:
                    raise
                raise ArgumentError(self._watch.problem) from None
