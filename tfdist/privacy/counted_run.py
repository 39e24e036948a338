"""What private trainings of examples and of clients have in common: their count and report."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import secrets
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from tfdist import data
from tfdist.privacy import validation
from tfdist.privacy.accounting.ledger import Ledger, dp_accounting
from tfdist.privacy.accounting.report import Report
from tfdist.privacy.budget import PrivacyBudget, budgets_among
from tfdist.privacy.client_dp import ClientDP
from tfdist.privacy.leaking_callbacks import StepLogs
from tfdist.privacy.progress import StepProgress, watched
from tfdist.privacy.settings import DPSGD
from tfdist.privacy.spending import Spending
from tfdist.training.request import Request

Privacy = TypeVar("Privacy", bound=DPSGD | ClientDP)


class CountedRun(abc.ABC, Generic[Privacy]):
    """A private `fit`, whose steps a ledger counts.

    Args:
        privacy: The settings.
        request: The arguments of `fit`.

    Attributes:
        privacy: The settings.
        planned_steps: The planned steps of this `fit`. They are set by `plan`.
        seed: The seed of all random choices but the noise.
        is_seeded: Whether the user has chosen `seed`. Otherwise it is secret.

    Raises:
        ArgumentError: A callback cannot be used in private training.
        MissingPackageError: dp-accounting is not installed.
    """

    planned_steps: int
    _progress: StepProgress
    _spending: Spending

    def __init__(self, privacy: Privacy, request: Request) -> None:
        callbacks = request.callbacks
        listed = getattr(callbacks, "callbacks", callbacks)
        self._callbacks = [*listed] if isinstance(listed, list | tuple) else [listed]
        validation.check_traced(request.model)
        validation.check_callbacks(callbacks, request.x)
        self._validates_inside = validation.check_validation(
            callbacks, request.x, request.validation_data, request.validation_split
        )
        dp_accounting()  # a missing package is reported now, not after training
        self.privacy = privacy
        self._model, self._session = request.model, request.session
        user_seed = privacy.seed if request.seed is None else request.seed
        self.seed = secrets.randbits(127) if user_seed is None else user_seed
        self.is_seeded = user_seed is not None

    def _begin_count(self, request: Request, has_secret_draws: bool, updates: int = 1) -> None:
        """Makes the counters.

        Args:
            request: The arguments of `fit`.
            has_secret_draws: Whether nobody knows which examples or clients a step draws, or
                the guarantee does not need that.
            updates: How far a step moves the optimizer's count.
        """
        self._progress = StepProgress(self._model, self.privacy, updates)
        self._spending = Spending(
            self.privacy,
            self._session,
            self._model,
            self._progress,
            request.callbacks,
            secret=self.privacy.seed is None and has_secret_draws,
        )

    @abc.abstractmethod
    def plan(self, source: data.Source, epochs: int) -> None:
        """Calibrates the noise.

        Args:
            source: The data.
            epochs: The number of epochs.
        """

    @abc.abstractmethod
    def notice(self) -> str | None:
        """Returns what the user should know before training."""

    @property
    @abc.abstractmethod
    def common_settings(self) -> dict[str, Any]:
        """The settings that must be equal on all workers."""

    @property
    @abc.abstractmethod
    def settings(self) -> dict[str, Any]:
        """The settings that must not change in a continued training."""

    def go_on(
        self, saved: dict[str, Any] | None = None, steps: int = 0, directory: Any = None
    ) -> dict[str, Any]:
        """Reads the records of earlier processes; see `Spending.go_on`."""
        return self._spending.go_on(saved, steps, directory)

    @property
    def _delta(self) -> float:
        assert self.privacy.delta is not None  # the settings have checked it
        return self.privacy.delta

    def _phase_settings(self, *left_out: str) -> dict[str, Any]:
        """Returns what a step costs, without what differs between processes.

        Args:
            *left_out: Names of further fields to leave out.
        """
        described = dataclasses.asdict(self._spending.phase(0))
        for name in ("run_id", "groups", "after", "continues", "secret", *left_out):
            del described[name]
        return described

    @property
    def steps_made(self) -> int:
        """The number of steps of this training, with those of earlier processes."""
        return self._progress.steps_made

    @property
    def restored_steps(self) -> int:
        """The number of steps of earlier processes."""
        return self._progress.restored_steps

    def ledger(self, steps: int) -> Ledger:
        """Returns all private steps on the data.

        Args:
            steps: The number of steps of this training.
        """
        return self._spending.ledger(steps)

    def report(self) -> Report:
        """Returns the report of all steps so far."""
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

    def _counted(self, callbacks: Any, step: Any, noisy: Sequence[str] = ()) -> Any:
        """Adds callbacks that count steps, and renews the noise.

        Args:
            callbacks: A list of callbacks, or a `CallbackList`.
            step: What counts steps and draws noise; see `StepProgress.restart`.
            noisy: Names of logs that have noise.
        """
        self._progress.restart(step)
        if self._spending.limit is not None:
            kept = getattr(callbacks, "callbacks", callbacks)
            kept.append(PrivacyBudget(self._spending.limit))
        for budget in budgets_among(callbacks):
            budget.run = self
        names = StepLogs(self._callbacks, noisy)
        with_counters = watched(callbacks, self._progress, self._spending, names)
        return self._spending.outside.watched(with_counters)

    def counting(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context for the training. Its steps count even if it fails."""
        return self._spending.counting()

    def note_restored(self) -> None:
        """Called after a checkpoint was restored."""
        self._progress.number_by_optimizer()
        self._progress.look()
