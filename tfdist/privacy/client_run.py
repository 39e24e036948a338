"""One `fit` with client-level privacy: its drawn clients, its noise and its cost."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import secrets
from typing import Any

from tfdist import data
from tfdist.errors import ArgumentError
from tfdist.federated.clients import Clients
from tfdist.federated.settings import FedAvg
from tfdist.federated.source import Rounds
from tfdist.privacy import leaking_callbacks, validation
from tfdist.privacy.accounting.ledger import CLIENT, Ledger, Phase, dp_accounting
from tfdist.privacy.accounting.report import Report, careless_delta
from tfdist.privacy.budget import PrivacyBudget
from tfdist.privacy.calibration import find_noise
from tfdist.privacy.client_dp import ClientDP
from tfdist.privacy.leaking_callbacks import StepLogs
from tfdist.privacy.mechanism.client_updates import ClientUpdates
from tfdist.privacy.planning import Plan
from tfdist.privacy.progress import StepProgress, watched
from tfdist.privacy.spending import Spending
from tfdist.training.request import Request


class ClientRun:
    """A `fit` with client-level privacy, from its arguments to its report.

    A step of the ledger is a round.

    Args:
        federated: The argument `federated` of `fit`, with `privacy`.
        request: The other arguments of `fit`.

    Attributes:
        privacy: The settings.
        mechanism: The clipping and the noise. It is set by `plan`.
        planned_steps: The planned rounds of this `fit`.
        seed: The seed of all random choices but the noise.
        is_seeded: Whether the user has chosen it. Otherwise it is secret.

    Raises:
        ArgumentError: An argument cannot be used with client-level privacy.
        MissingPackageError: dp-accounting is not installed.
    """

    mechanism: ClientUpdates
    planned_steps: int

    def __init__(self, federated: FedAvg, request: Request) -> None:
        session, model, callbacks = request.session, request.model, request.callbacks
        privacy = federated.privacy
        if not isinstance(privacy, ClientDP):
            raise ArgumentError(
                "`privacy` of FedAvg must be a tfdist.ClientDP or None. Received: "
                f"privacy={privacy!r}."
            )
        _check(request)
        listed = getattr(callbacks, "callbacks", callbacks)
        self._callbacks = [*listed] if isinstance(listed, list | tuple) else [listed]
        validation.check_callbacks(callbacks, request.x)
        self._validates_inside = validation.check_validation(
            callbacks, request.x, request.validation_data, request.validation_split
        )
        dp_accounting()  # a missing package is reported now, not after training
        self.privacy = privacy
        self._model, self._session = model, session
        user_seed = privacy.seed if request.seed is None else request.seed
        self.seed = secrets.randbits(127) if user_seed is None else user_seed
        self.is_seeded = user_seed is not None
        assert federated.local_steps is not None  # `FedAvg` has checked it
        self._progress = StepProgress(model, privacy, federated.local_steps)
        secret = privacy.seed is None and user_seed is None
        self._spending = Spending(
            privacy, session, model, self._progress, callbacks, secret=secret
        )

    def go_on(
        self, saved: dict[str, Any] | None = None, kept: int = 0, directory: Any = None
    ) -> dict[str, Any]:
        """Reads the records of earlier processes; see `Spending.go_on`."""
        return self._spending.go_on(saved, kept, directory)

    def plan(self, source: data.Source, epochs: int) -> None:
        """Calibrates the noise.

        Args:
            source: The rounds.
            epochs: The number of rounds.

        Raises:
            ArgumentError: The budget is spent, or there is too little noise.
        """
        assert isinstance(source, Rounds)
        privacy, clients = self.privacy, source.plan.clients
        probability = privacy.sampling_probability
        self.planned_steps = max(0, epochs)
        phase = Phase(probability, 0.0, 1, num_rows=clients.number, unit=CLIENT)
        phase = self._spending.named(phase, _fingerprint(clients))
        self.ledger(0).add(phase).check_unit()
        expected = probability * clients.number
        planned = Plan(self.planned_steps, phase, expected, expected)
        noise, _ = find_noise(privacy, self._session, self._spending, planned, phase)
        phase = dataclasses.replace(phase, noise_multiplier=noise)
        self._spending.plan(phase, self.planned_steps)
        self.noise_multiplier = noise
        self.mechanism = ClientUpdates(
            privacy.l2_norm_clip, noise, probability, clients.number, self._session.strategy
        )
        leaking_callbacks.check_names(self._callbacks, self._model.get_metrics_result())

    def notice(self) -> str | None:
        """Says how large the noise is, and warns of a large `delta`."""
        noise = (
            f"each round adds noise of standard deviation {self.mechanism.deviation:.2g} to "
            "each weight of the server's update"
        )
        careless = careless_delta(self.ledger(self.planned_steps), self._delta)
        lines = [noise, careless, self._spending.notice()]
        return "\ntfdist: ".join(filter(None, lines))

    @property
    def _delta(self) -> float:
        assert self.privacy.delta is not None  # ClientDP has checked it
        return self.privacy.delta

    @property
    def common_settings(self) -> dict[str, Any]:
        """The settings that must be equal on all workers."""
        return {
            "client-level privacy": (self.privacy.l2_norm_clip, self._delta),
            "sampling_probability": self.privacy.sampling_probability,
            "noise_multiplier": self.noise_multiplier,
            "relation": self.privacy.relation,
            "spent before": self.ledger(0),
        }

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that must not change in a continued training."""
        described = dataclasses.asdict(self._spending.phase(0))
        for name in ("run_id", "groups", "after", "continues", "secret"):
            del described[name]
        return {"l2_norm_clip": self.privacy.l2_norm_clip, **described}

    @property
    def steps_made(self) -> int:
        """The number of rounds of this training, with those of earlier processes."""
        return self._progress.steps_made

    @property
    def restored_steps(self) -> int:
        """The number of rounds of earlier processes."""
        return self._progress.restored_steps

    def ledger(self, steps: int) -> Ledger:
        """Returns all private rounds with these clients.

        Args:
            steps: The number of rounds of this training.
        """
        return self._spending.ledger(steps)

    def report(self) -> Report:
        """Returns the report of all rounds so far."""
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
        )

    def watched(self, callbacks: Any) -> Any:
        """Adds callbacks that count rounds, and renews the noise.

        Args:
            callbacks: A list of callbacks, or a `CallbackList`.
        """
        self._progress.restart(self.mechanism)
        listed = getattr(callbacks, "callbacks", callbacks)
        if self._spending.limit is not None:
            listed.append(PrivacyBudget(self._spending.limit))
        for callback in listed:
            if isinstance(callback, PrivacyBudget):
                callback.run = self
        names = StepLogs(self._callbacks, ())
        counted = watched(callbacks, self._progress, self._spending, names)
        return self._spending.outside.watched(counted)

    def counting(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context for the training. Its rounds count even if it fails."""
        return self._spending.counting()

    def note_restored(self) -> None:
        """Called after a checkpoint was restored."""
        self._progress.number_by_optimizer()
        self._progress.look()


def _check(request: Request) -> None:
    """Refuses arguments of `fit` that client-level privacy does not cover."""
    if request.is_private:
        raise ArgumentError(
            "Either examples or clients must be protected, not both at once. Received: "
            "`privacy` of `fit`, and `privacy` of FedAvg. Leave one of them out."
        )
    validation.check_class_weight(request.class_weight)
    validation.check_sums(request.session)


def _fingerprint(clients: Clients) -> str:
    """Returns a hash of which rows of this process belong to which client."""
    digest = hashlib.sha256(clients.sizes.tobytes() + clients.workers.tobytes())
    for client in sorted(clients.members):
        digest.update(clients.members[client].tobytes())
    return digest.hexdigest()
